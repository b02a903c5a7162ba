//! All connections, and which packet goes to which.
//!
//! A connection is known to the guest by its two ports, and to the host by its socket. It has a token of its
//! own, never used twice, so that a late event of a socket cannot reach another connection; and it outlives its
//! ports when the guest has forgotten it while some of its data is still on its way to the host.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::RecvFlags;

use super::connection::Connection;
use super::credit::BUFFER_BYTES;
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::virtio::io::Buffers;

/// The most connections, those that are being asked for included.
pub const CONNECTIONS_MAX: usize = 1024;

/// The most resets that wait for a buffer of the guest; with so many, its packets wait, too.
const RESETS_MAX: usize = 256;

/// The first port that host programs' connections come from.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The most bytes of a `CONNECT <port>` line.
const COMMAND_BYTES_MAX: usize = 32;

/// The token of the listening socket.
const LISTENER: u64 = 0;

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Token(u64);

/// By what the guest knows a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

impl Ports {
    /// Those of a packet that the guest has sent.
    fn of(header: &Header) -> Self {
        Self { host: header.dst_port, guest: header.src_port }
    }
}

/// A connection with its ports.
struct Entry {
    ports: Ports,
    connection: Connection,
    /// Whether it waits in line for a buffer of the guest.
    queued: bool,
}

/// Counters.
#[derive(Default)]
struct Counters {
    opened: u64,
    refused: u64,
    bytes_to_host: u64,
    bytes_to_guest: u64,
}

/// All connections of a guest.
pub struct Mux {
    guest_cid: u64,
    /// The path that a port is appended to for the host program that listens for it.
    dial: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    entries: HashMap<Token, Entry>,
    by_ports: HashMap<Ports, Token>,
    /// Host programs that have not said yet which port they want.
    asking: HashMap<Token, UnixStream>,
    /// Connections that may have a packet for the guest, in turn.
    line: VecDeque<Token>,
    resets: VecDeque<Header>,
    next_token: u64,
    next_host_port: u32,
    counters: Counters,
}

impl Mux {
    /// Connections of the guest `guest_cid`, whose host ports are unix sockets beginning with `dial`; host
    /// programs connect to `listener`.
    pub fn new(guest_cid: u64, dial: PathBuf, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), flags)?;
        Ok(Self {
            guest_cid,
            dial,
            listener,
            epoll,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            asking: HashMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: LISTENER + 1,
            next_host_port: FIRST_HOST_PORT,
            counters: Counters::default(),
        })
    }

    /// Readable when a socket has changed and [`Mux::poll`] is to be called.
    pub fn event_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes up what has happened at the sockets.
    pub fn poll(&mut self) {
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, Some(&now)) {
                Ok(0) => break,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "watching vsock sockets");
                    break;
                }
            }
            for event in &events {
                self.socket_event(event.data.u64(), event.flags);
            }
        }
    }

    fn socket_event(&mut self, token: u64, flags: EventFlags) {
        if token == LISTENER {
            self.accept();
            return;
        }
        let token = Token(token);
        if self.asking.contains_key(&token) {
            self.read_command(token);
        }
        let broken = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if let Some(entry) = self.entries.get_mut(&token) {
            entry.connection.socket_changed(
                broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                broken || flags.contains(EventFlags::OUT),
            );
            self.settle(token);
        }
    }

    /// Puts a connection in line, or removes it, as its state asks.
    fn settle(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        if entry.connection.is_orphan() && self.by_ports.get(&entry.ports) == Some(&token) {
            self.by_ports.remove(&entry.ports);
        }
        if entry.connection.is_over() {
            self.entries.remove(&token);
        } else if entry.connection.has_packet() && !entry.queued {
            entry.queued = true;
            self.line.push_back(token);
        }
    }

    fn token(&mut self) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        token
    }

    fn is_full(&self) -> bool {
        self.entries.len() + self.asking.len() >= CONNECTIONS_MAX
    }

    fn watch(&self, stream: &UnixStream, token: Token) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, stream, EventData::new_u64(token.0), flags)?)
    }

    /// Accepts host programs.
    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection to the guest");
                    return;
                }
            };
            if self.is_full() {
                self.counters.refused += 1;
                continue;
            }
            let token = self.token();
            if self.watch(&stream, token).is_ok() {
                self.asking.insert(token, stream);
            }
        }
    }

    /// Reads the line by which a host program says which port it wants, and nothing behind it.
    fn read_command(&mut self, token: Token) {
        let Some(stream) = self.asking.get_mut(&token) else { return };
        let port = match peek_command(stream) {
            Ok(Command::Incomplete) => return,
            Ok(Command::Connect(port)) => Some(port),
            Err(error) => {
                tracing::debug!(%error, "a host program did not ask for a port of the guest");
                None
            }
        };
        let Some(stream) = self.asking.remove(&token) else { return };
        if let Some(guest) = port {
            let ports = Ports { host: self.free_host_port(guest), guest };
            self.insert(token, ports, Connection::requested(stream));
        }
    }

    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(&mut self, token: Token, ports: Ports, connection: Connection) {
        self.counters.opened += 1;
        self.by_ports.insert(ports, token);
        self.entries.insert(token, Entry { ports, connection, queued: false });
        self.settle(token);
    }

    /// Whether a packet of the guest can be taken: each may have to be answered by a reset.
    pub fn accepts_packets(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Takes a packet of the guest with its data.
    pub fn packet_of_guest(&mut self, header: &Header, data: Buffers<'_>) {
        if header.src_cid != self.guest_cid {
            tracing::debug!(cid = header.src_cid, "dropped a packet with a false sender");
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        if header.op() == Some(Op::Request) {
            self.connect(header);
            return;
        }
        let Some(token) = self.by_ports.get(&Ports::of(header)).copied() else {
            self.refuse(header);
            return;
        };
        let Some(entry) = self.entries.get_mut(&token) else { return };
        if header.op() == Some(Op::Data) {
            self.counters.bytes_to_host += u64::from(header.len);
        }
        if let Err(violation) = entry.connection.packet(header, data, entry.ports.host) {
            tracing::debug!(host_port = entry.ports.host, %violation, "reset a connection of the guest");
            entry.connection.forsake();
            self.refuse(header);
        }
        self.settle(token);
    }

    /// The guest asks for a connection to a port of the host.
    fn connect(&mut self, header: &Header) {
        let ports = Ports::of(header);
        if let Some(old) = self.by_ports.remove(&ports) {
            // The guest uses its port again, so it has forgotten the old connection.
            if let Some(entry) = self.entries.get_mut(&old) {
                entry.connection.forsake();
            }
            self.settle(old);
        }
        match self.dial(ports.host) {
            Ok((token, stream)) => self.insert(token, ports, Connection::accepted(stream, header)),
            Err(error) => {
                tracing::debug!(port = ports.host, %error, "refused a connection of the guest");
                self.counters.refused += 1;
                self.refuse(header);
            }
        }
    }

    /// Connects to the host program that listens for a port.
    fn dial(&mut self, port: u32) -> io::Result<(Token, UnixStream)> {
        if self.is_full() {
            return Err(io::Error::other("too many connections"));
        }
        let mut path = self.dial.clone().into_os_string();
        path.push(format!("_{port}"));
        let stream = connect_at_once(&PathBuf::from(path))?;
        let token = self.token();
        self.watch(&stream, token)?;
        Ok((token, stream))
    }

    /// Answers a packet with a reset. A reset itself is never answered.
    fn refuse(&mut self, header: &Header) {
        if header.op() == Some(Op::Reset) {
            return;
        }
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// The next packet for the guest, its data written to `room`; none if there was none after all.
    pub fn packet_for_guest(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.line.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else { continue };
            entry.queued = false;
            let ports = entry.ports;
            let outgoing = entry.connection.next_packet(room);
            self.settle(token);
            if let Some(outgoing) = outgoing {
                self.counters.bytes_to_guest += u64::from(outgoing.len);
                return Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.guest_cid,
                    src_port: ports.host,
                    dst_port: ports.guest,
                    len: outgoing.len,
                    kind: TYPE_STREAM,
                    op: outgoing.op as u16,
                    flags: outgoing.flags,
                    buf_alloc: BUFFER_BYTES,
                    fwd_cnt: outgoing.fwd_cnt,
                });
            }
        }
        None
    }

    /// Forgets every connection: the guest has reset the device.
    pub fn clear(&mut self) {
        self.by_ports.clear();
        self.line.clear();
        self.resets.clear();
        let tokens: Vec<_> = self.entries.keys().copied().collect();
        for token in tokens {
            if let Some(entry) = self.entries.get_mut(&token) {
                entry.queued = false;
                entry.connection.forsake();
            }
            self.settle(token);
        }
    }

    /// Counters for the statistics.
    pub fn statistics(&self) -> BTreeMap<String, u64> {
        [
            ("connections", self.entries.len() as u64),
            ("opened", self.counters.opened),
            ("refused", self.counters.refused),
            ("bytes_to_host", self.counters.bytes_to_host),
            ("bytes_to_guest", self.counters.bytes_to_guest),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
    }
}

/// Connects without waiting: a listener whose backlog is full refuses.
fn connect_at_once(path: &std::path::Path) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// What a host program has said so far.
enum Command {
    Incomplete,
    Connect(u32),
}

/// Reads `CONNECT <port>\n` once it is there in full.
fn peek_command(stream: &mut UnixStream) -> io::Result<Command> {
    let mut line = [0; COMMAND_BYTES_MAX];
    let (_, length) = match rustix::net::recv(stream.as_fd(), &mut line, RecvFlags::PEEK) {
        Ok(received) => received,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Command::Incomplete),
        Err(error) => return Err(error.into()),
    };
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let heard = line.get(..length).unwrap_or_default();
    let Some(end) = heard.iter().position(|byte| *byte == b'\n') else {
        let full = length == COMMAND_BYTES_MAX;
        return if full { Err(io::ErrorKind::InvalidData.into()) } else { Ok(Command::Incomplete) };
    };
    let port = parse_command(heard.get(..end).unwrap_or_default()).ok_or(io::ErrorKind::InvalidData)?;
    let mut taken = [0; COMMAND_BYTES_MAX];
    stream.read_exact(taken.get_mut(..=end).unwrap_or_default())?;
    Ok(Command::Connect(port))
}

fn parse_command(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    if port.bytes().all(|byte| byte.is_ascii_digit()) { port.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_connect_and_a_port() {
        assert_eq!(parse_command(b"CONNECT 52"), Some(52));
        assert_eq!(parse_command(b"CONNECT 4294967295"), Some(u32::MAX));
        for bad in ["CONNECT ", "CONNECT -1", "CONNECT +1", "CONNECT 4294967296", "connect 1", "CONNECT 1 "] {
            assert_eq!(parse_command(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
