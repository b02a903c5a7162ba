//! One connection: the machine between a unix socket of the host and the guest's packets.
//!
//! The two directions are independent, and each ends by itself:
//!
//! ```text
//! guest ─► host   Open ──SHUTDOWN SEND──► Draining ──all is written──► Ended: the socket is shut down
//! host ─► guest   the socket is at its end ──► SHUTDOWN SEND
//! ```
//!
//! A guest that closes its socket sends SHUTDOWN for both, and forgets the connection when it gets a reset (or
//! after 8 seconds, by a reset of its own). A host program that closes its socket is announced by SHUTDOWN for
//! both, too, and the guest answers with a reset when its program has read everything.
//!
//! What the guest has sent before it shut down, closed or reset a connection reaches the host all the same,
//! however slowly the host reads. Data of the guest that the socket does not take at once is kept, at most
//! [`BUFFER_BYTES`](super::credit::BUFFER_BYTES) of it, and the guest is told only when it has left. Data of the host is read from the
//! socket only when there is a buffer of the guest to read it into and credit to send it: until then it waits
//! in the socket, and the host program that writes it waits, too.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::credit::{ReceiveWindow, SendWindow};
use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::io::Buffers;

/// The guest broke the protocol of this connection: it is reset.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Violation(&'static str);

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has been asked for a connection.
    Requested,
    /// Data flows.
    Established,
    /// The guest has forgotten the connection; only what it had sent is left to do.
    Orphan,
}

/// Where the guest's data stands on its way to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToHost {
    /// More may come.
    Open,
    /// The guest has ended it; some of it has not been written yet.
    Draining,
    /// Nothing more is written: all of it has been, or nobody reads it.
    Ended,
}

/// Packets that the guest must get, besides data.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
    /// Shutdown flags that it has not been sent yet.
    shutdown: u32,
}

impl Owed {
    fn anything(&self) -> bool {
        self.request
            || self.response
            || self.reset
            || self.credit_update
            || self.credit_request
            || self.shutdown != 0
    }
}

/// What a packet for the guest carries, besides the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// What it is for.
    pub op: Op,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// How much of the guest's data has left for the host.
    pub fwd_cnt: u32,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    phase: Phase,
    owed: Owed,
    to_host: ToHost,
    /// Shutdown flags that the guest has sent.
    guest_shutdown: u32,
    /// Whether the socket may have data that has not been read.
    readable: bool,
    /// Whether the socket may take more.
    writable: bool,
    /// What the guest has sent and the socket has not taken yet.
    backlog: VecDeque<u8>,
    receive: ReceiveWindow,
    send: SendWindow,
}

impl Connection {
    /// A connection that the guest asked for, to a host program that accepted it. The socket must not block.
    pub fn accepted(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream, Phase::Established);
        connection.owed.response = true;
        connection.send.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// A connection that a host program asks for. The socket must not block.
    pub fn requested(stream: UnixStream) -> Self {
        let mut connection = Self::new(stream, Phase::Requested);
        connection.owed.request = true;
        connection
    }

    fn new(stream: UnixStream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            owed: Owed::default(),
            to_host: ToHost::Open,
            guest_shutdown: 0,
            readable: true,
            writable: true,
            backlog: VecDeque::new(),
            receive: ReceiveWindow::default(),
            send: SendWindow::default(),
        }
    }

    /// Takes a packet of the guest, whose data is `data`. `host_port` is ours.
    pub fn packet(&mut self, header: &Header, data: Buffers<'_>, host_port: u32) -> Result<(), Violation> {
        self.send.update(header.buf_alloc, header.fwd_cnt);
        match (header.op(), self.phase) {
            (Some(Op::Reset), _) => {
                self.forsake();
                Ok(())
            }
            (Some(Op::Response), Phase::Requested) => {
                self.establish(host_port);
                Ok(())
            }
            (Some(Op::Data), Phase::Established) => self.data(header, data),
            (Some(Op::Shutdown), Phase::Established) => {
                self.guest_shut_down(header.flags);
                Ok(())
            }
            (Some(Op::CreditRequest), Phase::Established) => {
                self.owed.credit_update = true;
                Ok(())
            }
            (Some(Op::CreditUpdate), Phase::Established) => Ok(()),
            _ => Err(Violation("a packet that its state does not allow")),
        }
    }

    /// The guest has granted the connection: tells the host program.
    fn establish(&mut self, host_port: u32) {
        self.phase = Phase::Established;
        let words = format!("OK {host_port}\n");
        // A fresh socket takes this much at once, unless its other end is gone.
        if self.stream.write_all(words.as_bytes()).is_err() {
            self.host_stopped_receiving();
        }
    }

    fn data(&mut self, header: &Header, mut data: Buffers<'_>) -> Result<(), Violation> {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Err(Violation("data after it said that there would be none"));
        }
        if data.len() != header.len as usize {
            return Err(Violation("a packet with less data than it says"));
        }
        self.receive.receive(header.len).map_err(|_| Violation("more data than it was offered room for"))?;
        self.write_through(&mut data);
        self.keep(data);
        self.note_credit();
        Ok(())
    }

    /// Hands data to the socket, as much as it takes, unless older data waits for it.
    fn write_through(&mut self, data: &mut Buffers<'_>) {
        if !self.writable || !self.backlog.is_empty() || self.to_host == ToHost::Ended || data.is_empty() {
            return;
        }
        match data.write_to(self.stream.as_fd()) {
            Ok(bytes) => self.receive.forward(bytes as u32),
            Err(error) => self.write_failed(&error),
        }
    }

    /// Keeps what the socket did not take, unless nobody will ever read it.
    fn keep(&mut self, mut data: Buffers<'_>) {
        if self.to_host == ToHost::Ended {
            self.receive.forward(data.len() as u32);
            return;
        }
        let mut copy = vec![0; data.len()];
        if data.read(&mut copy).is_ok() {
            self.backlog.extend(copy);
        }
    }

    /// The guest will not send, or not receive, any more.
    fn guest_shut_down(&mut self, flags: u32) {
        let new = flags & !self.guest_shutdown;
        self.guest_shutdown |= new & (SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        if new & SHUTDOWN_RECEIVE != 0 {
            // The host program's next write fails, as it should.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if new & SHUTDOWN_SEND != 0 && self.to_host == ToHost::Open {
            self.to_host = ToHost::Draining;
        }
        self.end_if_drained();
        self.reset_if_over();
    }

    /// The guest knows nothing of this connection any more, or must not.
    pub fn forsake(&mut self) {
        self.phase = Phase::Orphan;
        self.owed = Owed::default();
        if self.to_host == ToHost::Open {
            self.to_host = ToHost::Draining;
        }
        self.end_if_drained();
    }

    /// Writes kept data, if the socket takes it.
    fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            match self.stream.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(bytes) => {
                    self.backlog.drain(..bytes);
                    self.receive.forward(bytes as u32);
                }
                Err(error) => self.write_failed(&error),
            }
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        self.note_credit();
        self.end_if_drained();
    }

    fn write_failed(&mut self, error: &io::Error) {
        match error.kind() {
            ErrorKind::WouldBlock => self.writable = false,
            ErrorKind::Interrupted => {}
            _ => self.host_stopped_receiving(),
        }
    }

    /// No host program will read what the guest sends: it is told so, and what is left is dropped.
    fn host_stopped_receiving(&mut self) {
        self.receive.forward(self.backlog.len() as u32);
        self.backlog.clear();
        self.to_host = ToHost::Ended;
        self.tell_shutdown(SHUTDOWN_RECEIVE);
        self.reset_if_over();
    }

    fn tell_shutdown(&mut self, flag: u32) {
        if self.phase == Phase::Established {
            self.owed.shutdown |= flag;
        }
    }

    /// The end of the guest's data arrives after all of it.
    fn end_if_drained(&mut self) {
        if self.to_host == ToHost::Draining && self.backlog.is_empty() {
            self.to_host = ToHost::Ended;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        self.reset_if_over();
    }

    /// A guest that has closed its socket waits for a reset, and gets it when all that it sent has arrived.
    fn reset_if_over(&mut self) {
        let closed = self.guest_shutdown == SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        if self.phase == Phase::Established && closed && self.to_host == ToHost::Ended {
            self.owed.reset = true;
        }
    }

    fn note_credit(&mut self) {
        if self.phase == Phase::Established && self.receive.update_due() {
            self.owed.credit_update = true;
        }
    }

    /// The socket has become readable, writable, or both; an error or an end counts as both.
    pub fn socket_changed(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        if writable {
            self.writable = true;
            self.flush();
        }
    }

    /// Whether nothing is left to do.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Orphan && self.to_host == ToHost::Ended
    }

    /// Whether the guest still knows this connection by its ports.
    pub fn is_orphan(&self) -> bool {
        self.phase == Phase::Orphan
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        self.phase != Phase::Orphan
            && (self.owed.anything() || (self.may_read() && self.send.available() > 0))
    }

    /// Whether the socket is to be read at all.
    fn may_read(&self) -> bool {
        self.phase == Phase::Established && self.readable && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// The next packet for the guest, its data written to `room`; none if there was none after all.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Outgoing> {
        let plain = |op| Some((op, 0, 0));
        let (op, flags, len) = if std::mem::take(&mut self.owed.reset) {
            self.phase = Phase::Orphan;
            plain(Op::Reset)
        } else if std::mem::take(&mut self.owed.request) {
            plain(Op::Request)
        } else if std::mem::take(&mut self.owed.response) {
            plain(Op::Response)
        } else if let Some(len) = self.read_data(room) {
            Some((Op::Data, 0, len))
        } else if self.owed.shutdown != 0 {
            Some((Op::Shutdown, std::mem::take(&mut self.owed.shutdown), 0))
        } else if std::mem::take(&mut self.owed.credit_request) {
            plain(Op::CreditRequest)
        } else if std::mem::take(&mut self.owed.credit_update) {
            plain(Op::CreditUpdate)
        } else {
            None
        }?;
        // Every packet but a reset tells the guest its credit.
        self.owed.credit_update = false;
        Some(Outgoing { op, flags, len, fwd_cnt: self.receive.announce() })
    }

    /// Reads data of the host into the guest's memory; none if there is nothing to send now.
    fn read_data(&mut self, room: &Buffers<'_>) -> Option<u32> {
        let most = room.len().min(self.send.available() as usize);
        if !self.may_read() || most == 0 {
            return None;
        }
        let mut room = room.clone().split_first(most).ok()?;
        match room.read_from(self.stream.as_fd()) {
            Ok(0) => {
                self.readable = false;
                self.host_stopped_sending();
                None
            }
            Ok(bytes) => {
                let bytes = bytes as u32;
                self.send.send(bytes);
                // The guest tells by itself when it has room again; asking once covers one that does not.
                self.owed.credit_request = self.send.available() == 0;
                Some(bytes)
            }
            Err(error) => {
                self.readable = false;
                if error.kind() != ErrorKind::WouldBlock {
                    self.host_stopped_sending();
                }
                None
            }
        }
    }

    /// The host program has shut down its side, or closed the socket.
    fn host_stopped_sending(&mut self) {
        self.tell_shutdown(SHUTDOWN_SEND);
        if self.to_host == ToHost::Open && is_hung_up(&self.stream) {
            self.host_stopped_receiving();
        }
    }
}

/// Whether the other end has closed its socket, not just shut down one side of it.
fn is_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = rustix::event::poll(&mut fds, Some(&now));
    polled.is_ok() && fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}
