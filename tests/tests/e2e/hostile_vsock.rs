//! A guest that owns its kernel, against the vsock device and those who listen behind it: raw packets.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::time::Instant;

use sandbox_tests::bare::{self, DATA, Ring, Script, device, flag};
use sandbox_tests::place::patience;
use sandbox_tests::process::POLL;
use sandbox_tests::vmm::{Machine, REPORT_PORT};

const SIZE: u16 = 128;
const CID: u64 = 3;

/// A port where the test listens, and one where nobody does.
const FLOODED: u32 = 6000;
const NOBODY: u32 = 6001;

/// Operations (virtio 1.2, 5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Where the first packet for the host lies; each has so many bytes.
const PACKETS: u32 = DATA;
const PACKET_BYTES: u32 = 1024;
/// Where a header has the guest's port.
const SOURCE_PORT: u32 = 16;
/// Buffers for packets to the guest.
const BUFFERS: u32 = DATA + 0x10_0000;

#[derive(Clone, Copy)]
struct Packet {
    source: u64,
    to: u64,
    ports: (u32, u32),
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

fn packet(op: u16, ports: (u32, u32)) -> Packet {
    Packet { source: CID, to: 2, ports, len: 0, kind: 1, op, flags: 0, buf_alloc: 1 << 16, fwd_cnt: 0 }
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.source.to_le_bytes().to_vec();
        bytes.extend(self.to.to_le_bytes());
        for word in [self.ports.0, self.ports.1, self.len] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

/// The guest's side of the device.
struct Guest {
    script: Script,
    rings: [Ring; 3],
}

impl Guest {
    fn new() -> Self {
        let mut script = Script::new();
        script.select(device::VSOCK);
        let mut rings = [0, 1, 2].map(|index| Ring::new(index, SIZE));
        script.bring_up(0, &mut rings);
        Self { script, rings }
    }

    /// Starts it, with a host program that listens at [`FLOODED`] and accepts nothing by itself.
    fn start(self) -> (Machine, UnixListener) {
        let mut listener = None;
        let mut machine = bare::start(self.script, |config, _| {
            let socket = config.vsock.as_ref().unwrap().socket.display().to_string();
            listener = Some(UnixListener::bind(format!("{socket}_{FLOODED}")).unwrap());
        });
        machine.expect_running();
        (machine, listener.unwrap())
    }

    /// Offers buffers for packets to the guest, the same ones again.
    fn add_buffers(&mut self, count: u16) {
        let [ring, ..] = &mut self.rings;
        for _ in 0..count {
            let slot = ring.offered() % SIZE;
            let buffer = u64::from(BUFFERS + 4096 * u32::from(slot));
            self.script.offer_chain(ring, slot, &[(buffer, 4096, flag::WRITE)]);
        }
        self.script.notify(ring);
    }

    /// Sends a packet of these bytes, and waits until the device has taken it.
    fn send(&mut self, bytes: &[u8]) {
        let [_, ring, _] = &mut self.rings;
        self.script.copy(PACKETS, bytes);
        self.script.offer_chain(ring, 0, &[(PACKETS.into(), bytes.len() as u32, 0)]);
        self.script.notify(ring);
        self.script.wait_used(ring);
    }

    /// Has requests to a port ready in the first `count` descriptors.
    fn prepare_requests(&mut self, port: u32, count: u16) {
        let [_, ring, _] = &self.rings;
        for slot in 0..count {
            let at = PACKETS + PACKET_BYTES * u32::from(slot);
            self.script.copy(at, &packet(op::REQUEST, (0, port)).bytes());
            let descriptor = bare::Descriptor { address: at.into(), len: 44, flags: 0, next: 0 };
            self.script.describe(ring, slot, descriptor);
        }
    }

    /// Offers requests that are ready, from ports that were not used before.
    fn flood(&mut self, first_port: u32, count: u16) {
        let [_, ring, _] = &mut self.rings;
        for slot in 0..count {
            let at = PACKETS + PACKET_BYTES * u32::from(slot);
            self.script.write32(at + SOURCE_PORT, first_port + u32::from(slot));
            self.script.offer(ring, slot);
        }
        self.script.notify(ring);
    }
}

fn counter(machine: &Machine, name: &str) -> u64 {
    machine.statistics().devices["vsock"][name]
}

/// Packets that make no sense, and what makes none in them.
fn nonsense() -> Vec<Vec<u8>> {
    let ports = (1000, NOBODY);
    let open = (1001, FLOODED);
    let mut packets = vec![vec![], vec![0], vec![0xff; 43], vec![0xff; 44], vec![0; 44]];
    for op in [0, 8, 255, u16::MAX] {
        packets.push(packet(op, ports).bytes());
        packets.push(packet(op, open).bytes());
    }
    for op in 1..=7 {
        // For a connection that there is not.
        packets.push(packet(op, ports).bytes());
        // From somebody else, to somebody else, of another kind.
        packets.push(Packet { source: 2, ..packet(op, ports) }.bytes());
        packets.push(Packet { source: u64::MAX, ..packet(op, ports) }.bytes());
        packets.push(Packet { to: CID, ..packet(op, ports) }.bytes());
        packets.push(Packet { to: u64::MAX, ..packet(op, ports) }.bytes());
        packets.push(Packet { kind: 2, ..packet(op, ports) }.bytes());
        packets
            .push(Packet { flags: u32::MAX, fwd_cnt: u32::MAX, buf_alloc: 0, ..packet(op, ports) }.bytes());
        // With data that is not there.
        packets.push(Packet { len: u32::MAX, ..packet(op, ports) }.bytes());
        packets.push(Packet { len: 1, ..packet(op, open) }.bytes());
    }
    packets
}

#[test]
fn packets_that_make_no_sense_end_connections_and_not_the_device() {
    let mut guest = Guest::new();
    for bytes in nonsense() {
        guest.send(&bytes);
        guest.add_buffers(1);
    }
    // For one that there is: each of these ends it, and it is made anew.
    let mut port = 2000;
    for op in
        [op::REQUEST, op::RESPONSE, op::DATA, op::CREDIT_UPDATE, op::CREDIT_REQUEST, op::SHUTDOWN, op::RESET]
    {
        for wrong in [
            Packet { len: u32::MAX, ..packet(op, (port, FLOODED)) },
            Packet { fwd_cnt: u32::MAX, buf_alloc: u32::MAX, ..packet(op, (port, FLOODED)) },
            Packet { flags: u32::MAX, buf_alloc: 0, ..packet(op, (port, FLOODED)) },
        ] {
            port += 1;
            guest.send(&packet(op::REQUEST, (port, FLOODED)).bytes());
            guest.send(&Packet { ports: (port, FLOODED), ..wrong }.bytes());
            guest.add_buffers(2);
        }
    }
    guest.send(&packet(op::REQUEST, (3000, REPORT_PORT)).bytes());
    guest.add_buffers(1);
    let hello = Packet { len: 6, ..packet(op::DATA, (3000, REPORT_PORT)) };
    guest.send(&[hello.bytes(), b"hello\n".to_vec()].concat());
    guest.script.say("sent\n");
    guest.script.halt();
    let (mut machine, _listener) = guest.start();
    bare::wait_for(&machine, "sent\n");
    machine.wait_for_report("hello\n");
}

#[test]
fn a_flood_of_connections_is_bounded_and_gone_after_a_reset() {
    const BATCH: u16 = 64;
    const BATCHES: u16 = 40;
    /// What the device has at most.
    const MOST: u64 = 1024;
    let mut guest = Guest::new();
    guest.prepare_requests(FLOODED, BATCH);
    for batch in 0..BATCHES {
        guest.add_buffers(BATCH);
        guest.flood(10_000 + u32::from(batch * BATCH), BATCH);
        guest.script.wait_used(&guest.rings[1]);
        guest.script.wait_used(&guest.rings[0]);
    }
    guest.script.bring_up(0, &mut guest.rings);
    guest.send(&packet(op::REQUEST, (1, NOBODY)).bytes());
    guest.script.say("flooded\n");
    guest.script.halt();
    let (mut machine, _listener) = guest.start();
    // Nobody accepts: those connections that there are wait at the listener.
    bare::wait_for(&machine, "flooded\n");
    let (opened, refused) = (counter(&machine, "opened"), counter(&machine, "refused"));
    assert!(opened <= MOST && opened + refused == u64::from(BATCH * BATCHES) + 1, "{opened} and {refused}");
    let deadline = Instant::now() + patience();
    while counter(&machine, "connections") > 0 {
        assert!(Instant::now() < deadline, "{} connections", counter(&machine, "connections"));
        std::thread::sleep(POLL);
    }
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", machine.process().pid())).unwrap().count();
    assert!(descriptors < 200, "{descriptors} descriptors");
}

#[test]
fn a_guest_that_takes_no_replies_is_not_heard_any_more_until_it_does() {
    const BATCH: u16 = 64;
    /// The most replies that wait.
    const WAITING: u16 = 256;
    let mut guest = Guest::new();
    guest.prepare_requests(NOBODY, BATCH);
    for batch in 0..WAITING / BATCH {
        guest.flood(10_000 + u32::from(batch * BATCH), BATCH);
        guest.script.wait_used(&guest.rings[1]);
    }
    let heard = guest.rings[1].offered();
    guest.flood(20_000, BATCH);
    guest.script.settle(guest.rings[1].used_address(), heard, 20_000);
    for _ in 0..5 {
        guest.add_buffers(BATCH);
        guest.script.wait_used(&guest.rings[0]);
    }
    guest.script.wait_used(&guest.rings[1]);
    let report = bare::run(guest.script, |_, _| {});
    assert_eq!(report, "-");
}

#[test]
fn data_beyond_the_credit_ends_the_connection_and_takes_no_memory() {
    const CHUNK: u32 = 60 << 10;
    let mut guest = Guest::new();
    guest.add_buffers(SIZE - 1);
    guest.send(&packet(op::REQUEST, (1, FLOODED)).bytes());
    let data = Packet { len: CHUNK, ..packet(op::DATA, (1, FLOODED)) };
    let [_, ring, _] = &mut guest.rings;
    guest.script.copy(PACKETS, &data.bytes());
    // 12 MiB, to a host that reads nothing; each packet behind the end of the connection is answered.
    for _ in 0..200 {
        let buffers = [(PACKETS.into(), 44, 0), (0x10_0000, CHUNK, 0)];
        guest.script.offer_chain(ring, 0, &buffers);
        guest.script.notify(ring);
        guest.script.wait_used(ring);
    }
    guest.script.say("sent\n");
    guest.script.halt();
    let (machine, listener) = guest.start();
    bare::wait_for(&machine, "sent\n");
    assert!(counter(&machine, "connections") <= 1);
    let (mut taken, _) = listener.accept().unwrap();
    taken.set_read_timeout(Some(patience())).unwrap();
    let mut all = vec![];
    // It ends, by an end or by a reset, after what fitted the credit.
    let _ = taken.read_to_end(&mut all);
    assert!(all.len() < 4 << 20, "{} bytes were kept", all.len());
}
