//! The device, driven through real queues with raw packets on one side and unix sockets on the other.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;

use super::credit::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::{Vsock, mux};
use crate::devices::testing::{self, Driver, Offered, Part};
use crate::virtio::{GuestMemory, VirtioDevice};

const GUEST_CID: u64 = 3;
const GUEST_PORT: u32 = 1000;
const HOST_PORT: u32 = 50;
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The size of the guest's buffers for packets to it, as Linux makes them.
const BUFFER: u32 = 4096;

/// A packet that the guest has received.
type Packet = (Header, Vec<u8>);

/// A guest and the host programs around it.
struct Machine {
    device: Vsock,
    memory: GuestMemory,
    drivers: [Driver; 3],
    buffers: VecDeque<Offered>,
    directory: TempDir,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut device = Vsock::new(GUEST_CID as u32, listener, socket).unwrap();
        device.activate(device.features());
        let memory = testing::memory();
        let drivers = [0, 1, 2].map(|queue| Driver::new(&memory, queue, 256));
        Self { device, memory, drivers, buffers: VecDeque::new(), directory }
    }

    /// A machine whose guest has buffers, and a connection that it has opened to the host.
    fn connected() -> (Self, UnixStream) {
        let mut machine = Self::new();
        machine.add_buffers(128);
        let host = machine.connect(GUEST_PORT);
        (machine, host)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// A host program that connects to the device's socket.
    fn dial(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("vsock")).unwrap()
    }

    /// The guest connects to a host program; returns the program's end.
    fn connect(&mut self, guest_port: u32) -> UnixStream {
        let path = self.directory.path().join(format!("vsock_{HOST_PORT}"));
        let _ = std::fs::remove_file(&path);
        let listener = self.listen(HOST_PORT);
        let packets = self.send(from(guest_port, Op::Request), &[]);
        assert_eq!(ops(&packets), [Op::Response]);
        assert_eq!((packets[0].0.src_port, packets[0].0.dst_port), (HOST_PORT, guest_port));
        assert_eq!(packets[0].0.buf_alloc, BUFFER_BYTES);
        listener.accept().unwrap().0
    }

    fn add_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let offered = self.drivers[0].offer(&[Part::Write(BUFFER)]);
            self.buffers.push_back(offered);
        }
    }

    /// The guest sends a packet, its data in pieces of its own; returns what it receives meanwhile.
    fn send(&mut self, mut header: Header, data: &[u8]) -> Vec<Packet> {
        header.len = data.len() as u32;
        self.send_as_is(header, data)
    }

    fn send_as_is(&mut self, header: Header, data: &[u8]) -> Vec<Packet> {
        let bytes = header.to_bytes();
        let (first, second) = data.split_at(data.len() / 3);
        let parts = [Part::Read(&bytes[..7]), Part::Read(&bytes[7..]), Part::Read(first), Part::Read(second)];
        self.drivers[1].offer(&parts);
        self.notify(1)
    }

    fn notify(&mut self, queue: usize) -> Vec<Packet> {
        testing::notify(&mut self.device, queue, &mut self.drivers, &self.memory).unwrap();
        self.received()
    }

    /// What the guest receives after something has happened at a socket.
    fn poll(&mut self) -> Vec<Packet> {
        testing::ready(&mut self.device, &mut self.drivers, &self.memory).unwrap();
        self.received()
    }

    fn received(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        for (head, written) in self.drivers[0].used() {
            let offered = self.buffers.pop_front().unwrap();
            assert_eq!(offered.head, head);
            if written == 0 {
                continue;
            }
            let bytes = self.drivers[0].read(offered.buffers[0]);
            let (header, data) = bytes[..written as usize].split_at(HEADER_BYTES);
            let header = Header::from_bytes(header.try_into().unwrap());
            assert_eq!(header.len as usize, data.len());
            packets.push((header, data.to_vec()));
        }
        packets
    }
}

fn from(guest_port: u32, op: Op) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: HOST_PORT,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 64 * 1024,
        ..Header::default()
    }
}

fn guest(op: Op) -> Header {
    from(GUEST_PORT, op)
}

fn shutdown(flags: u32) -> Header {
    Header { flags, ..guest(Op::Shutdown) }
}

fn ops(packets: &[Packet]) -> Vec<Op> {
    packets.iter().map(|(header, _)| header.op().unwrap()).collect()
}

fn data_of(packets: &[Packet]) -> Vec<u8> {
    packets.iter().flat_map(|(_, data)| data.iter().copied()).collect()
}

/// Bytes that tell their own place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).flat_map(|index| (index / 4).to_le_bytes()).take(length).collect()
}

#[test]
fn bytes_travel_both_ways() {
    let (mut machine, mut host) = Machine::connected();
    assert_eq!(machine.send(guest(Op::Data), b"to the host"), []);
    let mut heard = [0; 11];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"to the host");

    host.write_all(b"to the guest").unwrap();
    let packets = machine.poll();
    assert_eq!(ops(&packets), [Op::Data]);
    assert_eq!(packets[0].1, b"to the guest");
    assert_eq!(packets[0].0.fwd_cnt, 11);
    let header = packets[0].0;
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
    assert_eq!((header.src_port, header.dst_port), (HOST_PORT, GUEST_PORT));
}

#[test]
fn a_port_that_nobody_listens_on_refuses() {
    let mut machine = Machine::new();
    machine.add_buffers(1);
    let packets = machine.send(guest(Op::Request), &[]);
    assert_eq!(ops(&packets), [Op::Reset]);
    assert_eq!((packets[0].0.src_port, packets[0].0.dst_port), (HOST_PORT, GUEST_PORT));
}

#[test]
fn the_end_of_the_guests_data_leaves_the_other_direction_open() {
    let (mut machine, mut host) = Machine::connected();
    machine.send(guest(Op::Data), b"last words");
    assert_eq!(machine.send(shutdown(SHUTDOWN_SEND), &[]), []);
    let mut heard = String::new();
    host.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "last words");

    host.write_all(b"answer").unwrap();
    assert_eq!(data_of(&machine.poll()), b"answer");
}

#[test]
fn the_end_of_the_hosts_data_comes_after_all_of_it_and_leaves_the_other_direction_open() {
    let (mut machine, mut host) = Machine::connected();
    let sent = pattern(20_000);
    host.write_all(&sent).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let packets = machine.poll();
    assert_eq!(data_of(&packets), sent);
    let (last, _) = packets.last().unwrap();
    assert_eq!((last.op(), last.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));

    machine.send(guest(Op::Data), b"still here");
    let mut heard = [0; 10];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still here");
}

#[test]
fn a_host_program_that_closes_is_announced_for_both_directions() {
    let (mut machine, mut host) = Machine::connected();
    host.write_all(b"bye").unwrap();
    drop(host);
    let packets = machine.poll();
    assert_eq!(data_of(&packets), b"bye");
    let flags = packets.iter().map(|(header, _)| header.flags).fold(0, |all, flags| all | flags);
    assert_eq!(flags, BOTH);
    assert_eq!(machine.send(guest(Op::Reset), &[]), []);
    assert_eq!(machine.device.statistics()["connections"], 0);
}

#[test]
fn a_guest_that_closes_is_reset_when_its_data_has_arrived() {
    let (mut machine, mut host) = Machine::connected();
    machine.send(guest(Op::Data), b"done");
    assert_eq!(ops(&machine.send(shutdown(BOTH), &[])), [Op::Reset]);
    let mut heard = String::new();
    host.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "done");
    assert_eq!(machine.device.statistics()["connections"], 0);
}

/// Fills the socket and then the device's buffer, as a guest whose host program does not read; returns what
/// was sent.
fn send_all_that_fits(machine: &mut Machine) -> Vec<u8> {
    let mut sent = Vec::new();
    let mut forwarded = 0;
    let chunk = 16 * 1024;
    while sent.len() as u32 - forwarded + chunk <= BUFFER_BYTES {
        let data: Vec<u8> = pattern(sent.len() + chunk as usize).split_off(sent.len());
        let mut packets = machine.send(guest(Op::Data), &data);
        sent.extend(data);
        packets.extend(machine.send(guest(Op::CreditRequest), &[]));
        machine.add_buffers(packets.len());
        forwarded = packets.last().unwrap().0.fwd_cnt;
    }
    assert!(sent.len() > BUFFER_BYTES as usize);
    sent
}

#[test]
fn nothing_is_lost_when_the_guest_closes_before_a_slow_host_has_read() {
    for last in [shutdown(BOTH), guest(Op::Reset)] {
        let (mut machine, mut host) = Machine::connected();
        let sent = send_all_that_fits(&mut machine);
        assert_eq!(ops(&machine.send(last, &[])), [], "the reset has to wait for the data");
        assert_eq!(machine.device.statistics()["connections"], 1);
        let mut heard: Vec<u8> = Vec::new();
        host.set_nonblocking(true).unwrap();
        let mut chunk = vec![0; 64 * 1024];
        let mut resets = 0;
        loop {
            match host.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => heard.extend(&chunk[..length]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            resets += machine.poll().iter().filter(|(header, _)| header.op() == Some(Op::Reset)).count();
        }
        assert!(heard == sent, "{} of {} bytes", heard.len(), sent.len());
        let expected = usize::from(last.op() == Some(Op::Shutdown));
        assert_eq!(resets, expected, "only a guest that waits for a reset gets one");
        assert_eq!(machine.device.statistics()["connections"], 0);
    }
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let (mut machine, _host) = Machine::connected();
    send_all_that_fits(&mut machine);
    let packets = machine.send(guest(Op::Data), &pattern(16 * 1024));
    assert_eq!(ops(&packets), [Op::Reset]);
}

#[test]
fn the_host_waits_for_the_guests_credit() {
    let (mut machine, mut host) = Machine::connected();
    host.write_all(&pattern(100_000)).unwrap();
    let packets = machine.poll();
    let got = data_of(&packets);
    assert_eq!(got.len(), 64 * 1024);
    assert_eq!(packets.last().unwrap().0.op(), Some(Op::CreditRequest));
    assert_eq!(machine.poll(), []);

    let update = Header { fwd_cnt: 40_000, ..guest(Op::CreditUpdate) };
    let more = data_of(&machine.send(update, &[]));
    assert_eq!([got, more].concat(), pattern(100_000));
}

#[test]
fn data_waits_for_buffers_and_for_nothing_else() {
    let mut machine = Machine::new();
    machine.add_buffers(1);
    let mut host = machine.connect(GUEST_PORT);
    host.write_all(&pattern(9000)).unwrap();
    assert_eq!(machine.poll(), []);
    let mut got = Vec::new();
    while got.len() < 9000 {
        machine.add_buffers(1);
        let packets = machine.notify(0);
        assert_eq!(packets.len(), 1);
        got.extend(data_of(&packets));
    }
    assert_eq!(got, pattern(9000));
}

#[test]
fn what_fits_no_connection_is_reset_and_a_reset_is_not() {
    let mut machine = Machine::new();
    machine.add_buffers(64);
    let cases = [
        (guest(Op::Data), Some(Op::Reset)),
        (guest(Op::CreditRequest), Some(Op::Reset)),
        (shutdown(BOTH), Some(Op::Reset)),
        (guest(Op::Response), Some(Op::Reset)),
        (Header { kind: 2, ..guest(Op::Request) }, Some(Op::Reset)),
        (Header { dst_cid: 9, ..guest(Op::Request) }, Some(Op::Reset)),
        (Header { op: 77, ..guest(Op::Request) }, Some(Op::Reset)),
        (Header { op: 0, ..guest(Op::Request) }, Some(Op::Reset)),
        (guest(Op::Reset), None),
        (Header { src_cid: 4, ..guest(Op::Request) }, None),
    ];
    for (header, answer) in cases {
        let packets = machine.send_as_is(header, &[]);
        assert_eq!(ops(&packets), answer.into_iter().collect::<Vec<_>>(), "{header:?}");
    }
}

#[test]
fn a_packet_that_lies_about_its_length_is_reset() {
    for (len, data) in [(10, 4), (4, 10), (u32::MAX, 4), (0, 1)] {
        let (mut machine, mut host) = Machine::connected();
        let packets = machine.send_as_is(Header { len, ..guest(Op::Data) }, &pattern(data));
        assert_eq!(ops(&packets), [Op::Reset], "{len} {data}");
        assert_eq!(host.read(&mut [0; 16]).unwrap(), 0);
    }
}

#[test]
fn a_chain_without_room_for_a_header_is_dropped() {
    let mut machine = Machine::new();
    machine.drivers[1].offer(&[Part::Read(&[1; 43])]);
    machine.drivers[1].offer(&[Part::Write(100)]);
    assert_eq!(machine.notify(1), []);
    assert_eq!(machine.drivers[1].used().len(), 2);

    let small = machine.drivers[0].offer(&[Part::Write(43)]);
    machine.buffers.push_back(small);
    machine.add_buffers(1);
    assert_eq!(ops(&machine.send(guest(Op::Data), &[])), [Op::Reset]);
    assert!(machine.buffers.is_empty(), "both were returned");
}

#[test]
fn packets_wait_when_their_resets_do() {
    let mut machine = Machine::new();
    let mut answered = 0;
    for port in 0..200 {
        machine.send(from(port, Op::Data), &[]);
        answered += machine.drivers[1].used().len();
    }
    for port in 200..400 {
        machine.send(from(port, Op::Data), &[]);
        answered += machine.drivers[1].used().len();
    }
    assert_eq!(answered, 256, "the rest stays in the ring");
    let mut resets = 0;
    while resets < 400 {
        machine.add_buffers(50);
        let packets = machine.notify(0);
        assert!(!packets.is_empty());
        resets += packets.len();
    }
    assert_eq!(resets, 400);
}

#[test]
fn a_host_program_reaches_a_port_of_the_guest() {
    let mut machine = Machine::new();
    machine.add_buffers(16);
    let mut host = machine.dial();
    host.write_all(b"CONN").unwrap();
    assert_eq!(machine.poll(), []);
    host.write_all(b"ECT 52\nearly").unwrap();
    let packets = machine.poll();
    assert_eq!(ops(&packets), [Op::Request]);
    let request = packets[0].0;
    assert_eq!(request.dst_port, 52);

    let answer = |op| Header { src_port: 52, dst_port: request.src_port, ..guest(op) };
    let packets = machine.send(answer(Op::Response), &[]);
    assert_eq!(data_of(&packets), b"early");
    let expected = format!("OK {}\n", request.src_port);
    let mut line = vec![0; expected.len()];
    host.read_exact(&mut line).unwrap();
    assert_eq!(line, expected.as_bytes());

    machine.send(answer(Op::Data), b"welcome");
    let mut heard = [0; 7];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"welcome");
}

#[test]
fn a_host_program_is_hung_up_on_when_the_guest_refuses_or_it_speaks_nonsense() {
    let mut machine = Machine::new();
    machine.add_buffers(16);
    let mut host = machine.dial();
    host.write_all(b"CONNECT 52\n").unwrap();
    let request = machine.poll()[0].0;
    machine.send(Header { src_port: 52, dst_port: request.src_port, ..guest(Op::Reset) }, &[]);
    assert_eq!(host.read(&mut [0; 16]).unwrap(), 0);

    for nonsense in ["GET / HTTP/1.1\r\n", "CONNECT 99999999999999999999999999999999999999"] {
        let mut host = machine.dial();
        host.write_all(nonsense.as_bytes()).unwrap();
        assert_eq!(machine.poll(), []);
        // What it had not been read makes this a reset rather than an end.
        assert_ne!(host.read(&mut [0; 16]).unwrap_or(0), 16);
    }
    assert_eq!(machine.device.statistics()["connections"], 0);
}

#[test]
fn connections_are_bounded() {
    let mut machine = Machine::new();
    let listener = machine.listen(HOST_PORT);
    let mut hosts = Vec::new();
    for index in 0..mux::CONNECTIONS_MAX as u32 {
        machine.add_buffers(1);
        let packets = machine.send(from(index, Op::Request), &[]);
        assert_eq!(ops(&packets), [Op::Response]);
        hosts.push(listener.accept().unwrap().0);
    }
    machine.add_buffers(1);
    let packets = machine.send(from(u32::MAX, Op::Request), &[]);
    assert_eq!(ops(&packets), [Op::Reset]);
}

#[test]
fn a_reset_of_the_device_ends_every_connection() {
    let (mut machine, mut host) = Machine::connected();
    machine.send(guest(Op::Data), b"before");
    machine.device.reset();
    let mut heard = String::new();
    host.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "before");
    assert_eq!(machine.device.statistics()["connections"], 0);
}

#[test]
fn a_port_used_again_is_a_new_connection() {
    let (mut machine, mut old) = Machine::connected();
    machine.send(guest(Op::Data), b"old");
    let mut new = machine.connect(GUEST_PORT);
    machine.send(guest(Op::Data), b"new");
    let mut heard = String::new();
    old.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "old");
    let mut heard = [0; 3];
    new.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"new");
}

/// Whatever a guest sends, in whatever order, the device answers, stays within its limits, and keeps serving.
#[test]
fn random_packets_break_nothing() {
    let mut random = 7u32;
    let mut next = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 8) % below
    };
    let mut machine = Machine::new();
    let listener = machine.listen(HOST_PORT);
    listener.set_nonblocking(true).unwrap();
    let mut hosts = Vec::new();
    for _ in 0..20_000 {
        let pick = |value: u32, usual: u32, odd: u32| if value == 0 { odd } else { usual };
        let header = Header {
            src_cid: pick(next(50), GUEST_CID as u32, next(9)).into(),
            dst_cid: pick(next(50), HOST_CID as u32, next(9)).into(),
            src_port: next(8),
            dst_port: pick(next(20), HOST_PORT, next(99)),
            len: 0,
            kind: pick(next(50), TYPE_STREAM.into(), next(9)) as u16,
            op: next(9) as u16,
            flags: next(5),
            buf_alloc: next(100_000),
            fwd_cnt: next(100_000),
        };
        let data = vec![1; next(3) as usize * next(3000) as usize];
        let lie = next(30) == 0;
        machine.add_buffers(128 - machine.buffers.len());
        if lie {
            machine.send_as_is(Header { len: next(u32::MAX), ..header }, &data)
        } else {
            machine.send(header, &data)
        };
        machine.drivers[1].used();
        if let Ok((mut host, _)) = listener.accept() {
            let _ = host.write_all(b"greeting");
            hosts.push(host);
        }
        if hosts.len() > 20 {
            hosts.remove(next(20) as usize);
        }
        machine.poll();
        assert!(machine.device.statistics()["connections"] <= mux::CONNECTIONS_MAX as u64);
    }
    assert!(machine.device.statistics()["opened"] > 100);
    drop(listener);
    machine.add_buffers(128 - machine.buffers.len());
    let mut host = machine.connect(GUEST_PORT);
    machine.send(guest(Op::Data), b"alive");
    let mut heard = [0; 5];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"alive");
}

/// Two streams in opposite directions, moved on in a random order in random amounts, arrive whole.
#[test]
fn random_traffic_arrives_whole() {
    for seed in 1..=20u32 {
        let mut random = seed;
        let mut next = |below: usize| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 8) as usize % below
        };
        let (mut machine, mut host) = Machine::connected();
        host.set_nonblocking(true).unwrap();
        let total = 700_000;
        let all = pattern(total);
        let (mut guest_sent, mut host_heard) = (0usize, Vec::<u8>::new());
        let (mut host_sent, mut guest_heard) = (0usize, Vec::<u8>::new());
        let mut forwarded = 0u32;
        let mut told = 0u32;
        while host_heard.len() < total || guest_heard.len() < total {
            let mut packets = match next(4) {
                0 => {
                    let credit = BUFFER_BYTES as usize - (guest_sent - forwarded as usize);
                    let length = next(60_000).min(credit).min(total - guest_sent);
                    let header = Header { fwd_cnt: told, ..guest(Op::Data) };
                    let data = &all[guest_sent..guest_sent + length];
                    guest_sent += length;
                    machine.send(header, data)
                }
                1 => {
                    let length = next(60_000).min(total - host_sent);
                    host_sent += match host.write(&all[host_sent..host_sent + length]) {
                        Ok(written) => written,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                        Err(error) => panic!("{error}"),
                    };
                    machine.poll()
                }
                2 => {
                    let mut chunk = vec![0; 1 + next(60_000)];
                    if let Ok(length) = host.read(&mut chunk) {
                        host_heard.extend(&chunk[..length]);
                    }
                    machine.poll()
                }
                _ => {
                    told = guest_heard.len() as u32;
                    machine.send(Header { fwd_cnt: told, ..guest(Op::CreditUpdate) }, &[])
                }
            };
            machine.add_buffers(128 - machine.buffers.len());
            packets.extend(machine.notify(0));
            for (header, data) in packets {
                assert!(matches!(header.op(), Some(Op::Data | Op::CreditUpdate | Op::CreditRequest)));
                forwarded = header.fwd_cnt;
                guest_heard.extend(data);
            }
        }
        assert!(host_heard == all && guest_heard == all, "seed {seed}");
    }
}
