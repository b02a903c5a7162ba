//! Tests with a real tap, each in a network namespace of its own that ends with its thread.

use std::os::fd::IntoRawFd;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice, recv, send, socket_with,
};

use sandbox_vmm_api::TapSource;

use super::*;
use crate::devices::testing::{Driver, Part, memory, notify, ready};

const TAP: &str = "tap-test";
const MAC: config::MacAddress = config::MacAddress([2, 0, 0, 0, 0, 9]);
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// A device with its queues, and the host's side of its tap.
struct Bench {
    net: Net,
    memory: GuestMemory,
    drivers: [Driver; 2],
    host: OwnedFd,
}

/// Runs a test in a new network namespace with a tap; says so loudly where that is not permitted.
fn with_tap(features: u64, queue_size: u16, test: impl FnOnce(Bench) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || match own_network() {
            Ok(()) => test(bench(features, queue_size)),
            Err(why) => eprintln!("SKIPPED: a test with a tap: {why}"),
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A network namespace with a tap that takes large frames and queues few; without IPv6, which would send
/// frames of its own.
fn own_network() -> Result<(), String> {
    // SAFETY: the call touches no memory; this thread is the test's alone.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(format!("no network namespace: {}", io::Error::last_os_error()));
    }
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    for words in [
        format!("tuntap add {TAP} mode tap"),
        format!("link set {TAP} mtu 65521 txqueuelen 500"),
        format!("link set {TAP} up"),
    ] {
        let output =
            Command::new("ip").args(words.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
        if !output.status.success() {
            return Err(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    Ok(())
}

fn bench(features: u64, queue_size: u16) -> Bench {
    let mut net = Net::open(3, &config::Net { tap: TapSource::Name(TAP.to_owned()), mac: MAC }).unwrap();
    net.activate(features);
    let memory = memory();
    let mut drivers = [0, 1].map(|number| Driver::new(&memory, number, queue_size));
    for driver in &mut drivers {
        driver.queue.set_event_idx(features & EVENT_IDX != 0);
    }
    let bench = Bench { net, memory, drivers, host: host_socket() };
    bench.wait_for_link();
    bench
}

/// A socket that sends and receives whole frames on the tap, as the host's network does.
fn host_socket() -> OwnedFd {
    let every_protocol = u32::from(0x0003u16.to_be()).try_into().ok().map(rustix::net::Protocol::from_raw);
    let socket =
        socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, every_protocol).unwrap();
    let index = netdevice::name_to_index(&socket, TAP).unwrap();
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0x0003u16.to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is of the length that is given, and lives until the call returns.
    let outcome = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    socket
}

/// A frame of so many bytes that holds its number.
fn frame(number: u8, bytes: usize) -> Vec<u8> {
    let mut frame = [&MAC.0[..], &[2, 0, 0, 0, 0, 1], &[0x88, 0xb5], &[number]].concat();
    frame.extend((frame.len()..bytes).map(|at| (at % 251) as u8));
    frame
}

impl Bench {
    /// Waits until the host's network takes the tap for connected: it drops what it sends to it before.
    fn wait_for_link(&self) {
        let some_time = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        loop {
            self.host_sends(&frame(0, 60));
            let mut fds = [PollFd::new(&self.net.tap, PollFlags::IN)];
            if poll(&mut fds, Some(&some_time)).unwrap() == 1 {
                break;
            }
        }
        while rustix::io::read(&self.net.tap, &mut [0; 100]).is_ok() {}
    }

    fn host_sends(&self, frame: &[u8]) {
        assert_eq!(send(&self.host, frame, SendFlags::empty()), Ok(frame.len()));
    }

    /// The next frame that the host gets of the guest, if there is one.
    fn host_receives(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        let (count, _) = recv(&self.host, &mut buffer, RecvFlags::DONTWAIT).ok()?;
        buffer.truncate(count);
        Some(buffer)
    }

    fn ready(&mut self) -> Signals {
        ready(&mut self.net, &mut self.drivers, &self.memory).unwrap()
    }

    fn notify(&mut self, queue: usize) -> Signals {
        notify(&mut self.net, queue, &mut self.drivers, &self.memory).unwrap()
    }

    /// Sends what the guest has in a buffer; the chain must come back.
    fn guest_sends(&mut self, parts: &[Part<'_>]) {
        let offered = self.drivers[TRANSMIT].offer(parts);
        self.notify(TRANSMIT);
        assert_eq!(self.drivers[TRANSMIT].used(), [(offered.head, 0)]);
    }

    fn offer(&mut self, count: usize, bytes: u32) -> Vec<(u64, u32)> {
        (0..count).map(|_| self.drivers[RECEIVE].offer(&[Part::Write(bytes)]).buffers[0]).collect()
    }

    /// The frame that lies in the first of these buffers and those that follow, without its header; the number
    /// of buffers is the header's, the bytes are the used ring's.
    fn guest_receives(&mut self, buffers: &[(u64, u32)]) -> Vec<u8> {
        let driver = &mut self.drivers[RECEIVE];
        let used = driver.used();
        let count = u16::from_le_bytes(driver.read(buffers[0])[10..12].try_into().unwrap());
        assert_eq!(used.len(), usize::from(count));
        let bytes = |(used, buffer): (&(u16, u32), &(u64, u32))| driver.read((buffer.0, used.1));
        let whole: Vec<u8> = used.iter().zip(buffers).flat_map(bytes).collect();
        whole[tap::HEADER_BYTES..].to_vec()
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.statistics()[name]
    }

    fn calls_itself_again(&self) -> bool {
        self.net.again.read().is_ok()
    }
}

#[test]
fn the_guest_sends_frames() {
    with_tap(0, 256, |mut bench| {
        let frame = frame(1, 100);
        let (first, rest) = frame.split_at(20);
        bench.guest_sends(&[Part::Read(&[0; 12]), Part::Read(first), Part::Read(rest)]);
        assert_eq!(bench.host_receives(), Some(frame));
        assert_eq!((bench.counter("tx_frames"), bench.counter("tx_bytes")), (1, 100));
    });
}

#[test]
fn what_is_no_frame_is_dropped_and_comes_back() {
    with_tap(0, 256, |mut bench| {
        bench.guest_sends(&[Part::Read(&[0; 11])]);
        bench.guest_sends(&[Part::Read(&[0; 12 + 13])]);
        bench.guest_sends(&[Part::Write(100)]);
        bench.guest_sends(&[Part::Read(&vec![0; MAX_FRAME_BYTES + 1])]);
        // A kind of segmentation that there is not.
        let mut bad = vec![0, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        bad.extend(frame(1, 60));
        bench.guest_sends(&[Part::Read(&bad)]);
        // A checksum far outside the frame.
        let mut bad = vec![1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
        bad.extend(frame(1, 60));
        bench.guest_sends(&[Part::Read(&bad)]);
        assert_eq!(bench.host_receives(), None);
        assert_eq!((bench.counter("tx_frames"), bench.counter("tx_dropped")), (0, 6));
    });
}

#[test]
fn a_chain_beyond_the_limits_breaks_the_ring() {
    with_tap(0, 256, |mut bench| {
        bench.drivers[TRANSMIT].offer(&[Part::Read(&vec![0; MAX_CHAIN_BYTES as usize + 1])]);
        notify(&mut bench.net, TRANSMIT, &mut bench.drivers, &bench.memory).unwrap_err();
    });
}

#[test]
fn a_tap_that_is_down_takes_no_frames() {
    with_tap(0, 256, |mut bench| {
        assert!(Command::new("ip").args(["link", "set", TAP, "down"]).status().unwrap().success());
        bench.guest_sends(&[Part::Read(&[0; 12]), Part::Read(&frame(1, 60))]);
        assert_eq!(bench.counter("tx_dropped"), 1);
        bench.offer(1, 2048);
        assert!(bench.ready().is_empty());
    });
}

#[test]
fn the_guest_receives_a_frame_in_one_buffer() {
    for features in [0, MERGE] {
        with_tap(features, 256, |mut bench| {
            let buffers = bench.offer(2, 2048);
            let frame = frame(1, 1500);
            bench.host_sends(&frame);
            assert!(bench.ready().has(RECEIVE));
            assert!(bench.guest_receives(&buffers) == frame);
            assert_eq!((bench.counter("rx_frames"), bench.counter("rx_bytes")), (1, 1500));
        });
    }
}

#[test]
fn a_large_frame_lies_in_many_buffers() {
    for bytes in [2036, 2037, 2036 + 2048, 2036 + 2049, 65_535] {
        with_tap(MERGE, 256, |mut bench| {
            let buffers = bench.offer(40, 2048);
            let frame = frame(1, bytes);
            bench.host_sends(&frame);
            assert!(bench.ready().has(RECEIVE));
            assert!(bench.guest_receives(&buffers) == frame, "{bytes}");
            assert_eq!(bench.drivers[RECEIVE].queue.next_avail() as usize, (bytes + 12).div_ceil(2048));
        });
    }
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_dropped() {
    with_tap(0, 256, |mut bench| {
        let buffers = bench.offer(8, 1000);
        bench.host_sends(&frame(1, 1500));
        bench.host_sends(&frame(2, 500));
        assert!(bench.ready().has(RECEIVE));
        assert!(bench.guest_receives(&buffers) == frame(2, 500));
        assert_eq!((bench.counter("rx_frames"), bench.counter("rx_dropped")), (1, 1));
    });
}

#[test]
fn a_frame_that_no_full_ring_could_hold_is_dropped() {
    with_tap(MERGE, 8, |mut bench| {
        let buffers = bench.offer(8, 1000);
        bench.host_sends(&frame(1, 9000));
        bench.host_sends(&frame(2, 500));
        assert!(bench.ready().has(RECEIVE));
        assert!(bench.guest_receives(&buffers) == frame(2, 500));
        assert_eq!((bench.counter("rx_frames"), bench.counter("rx_dropped")), (1, 1));
    });
}

/// Tap and guest are both full; then the guest makes room. No event comes from the tap: its notification has
/// to be enough, and it has to have been asked for.
#[test]
fn frames_wait_for_buffers() {
    for features in [MERGE, MERGE | EVENT_IDX, 0, EVENT_IDX] {
        with_tap(features, 256, |mut bench| {
            for number in 0..100 {
                bench.host_sends(&frame(number, 100));
            }
            assert!(bench.ready().is_empty());
            assert_eq!(bench.drivers[RECEIVE].avail_event(), 0);
            for round in 0..2 {
                let offered = bench.drivers[RECEIVE].offered();
                let buffers = bench.offer(50, 2048);
                bench.notify(RECEIVE);
                let numbers: Vec<u8> =
                    buffers.iter().map(|buffer| bench.drivers[RECEIVE].read(*buffer)[12 + 14]).collect();
                assert_eq!(numbers, (round * 50..round * 50 + 50).collect::<Vec<u8>>());
                if features & EVENT_IDX != 0 {
                    assert_eq!(bench.drivers[RECEIVE].avail_event(), offered + 50);
                }
            }
            assert_eq!(bench.counter("rx_frames"), 100);
        });
    }
}

/// The frame waits whole although its beginning was in the guest's hands, and the guest is asked to notify of
/// what it offers after all that it has offered.
#[test]
fn a_frame_waits_for_enough_buffers() {
    for features in [MERGE, MERGE | EVENT_IDX] {
        with_tap(features, 256, |mut bench| {
            let frame = frame(1, 9000);
            bench.host_sends(&frame);
            let mut buffers = Vec::new();
            for round in 1..=4 {
                buffers.extend(bench.offer(2, 1000));
                assert!(bench.notify(RECEIVE).is_empty());
                assert!(!bench.calls_itself_again());
                assert_eq!(bench.drivers[RECEIVE].queue.next_avail(), 0);
                if features & EVENT_IDX != 0 {
                    assert_eq!(bench.drivers[RECEIVE].avail_event(), 2 * round);
                }
            }
            buffers.extend(bench.offer(2, 1000));
            assert!(bench.notify(RECEIVE).has(RECEIVE));
            assert!(bench.guest_receives(&buffers) == frame);
            assert_eq!(bench.counter("rx_frames"), 1);
        });
    }
}

#[test]
fn a_reset_forgets_the_frame_that_waits() {
    with_tap(MERGE, 256, |mut bench| {
        bench.host_sends(&frame(1, 9000));
        bench.offer(2, 1000);
        bench.ready();
        bench.net.reset();
        let fresh = memory();
        bench.drivers = [0, 1].map(|number| Driver::new(&fresh, number, 256));
        bench.memory = fresh;
        bench.net.activate(MERGE);
        let buffers = bench.offer(2, 1000);
        bench.host_sends(&frame(2, 100));
        assert!(bench.ready().has(RECEIVE));
        assert!(bench.guest_receives(&buffers) == frame(2, 100));
    });
}

#[test]
fn a_flood_is_served_in_portions() {
    with_tap(MERGE, 1024, |mut bench| {
        bench.offer(400, 2048);
        for number in 0..400 {
            bench.host_sends(&frame(number as u8, 100));
        }
        bench.ready();
        assert_eq!(bench.drivers[RECEIVE].used().len(), FRAMES_AT_A_TIME as usize);
        assert!(bench.calls_itself_again());
        bench.ready();
        assert_eq!(bench.counter("rx_frames"), 400);
        assert!(!bench.calls_itself_again());
    });
}

#[test]
fn a_guest_that_floods_is_served_in_portions() {
    with_tap(0, 1024, |mut bench| {
        let frame = [&[0; 12][..], &frame(1, 60)].concat();
        for _ in 0..400 {
            bench.drivers[TRANSMIT].offer(&[Part::Read(&frame)]);
        }
        bench.notify(TRANSMIT);
        assert_eq!(bench.counter("tx_frames"), u64::from(FRAMES_AT_A_TIME));
        assert!(bench.calls_itself_again());
        bench.ready();
        assert_eq!(bench.counter("tx_frames"), 400);
        assert_eq!(bench.drivers[TRANSMIT].used().len(), 400);
    });
}

#[test]
fn the_guest_is_interrupted_when_it_asked_for_it() {
    for (event, wanted) in [(0, true), (1, true), (3, true), (4, false), (100, false)] {
        with_tap(MERGE | EVENT_IDX, 256, move |mut bench| {
            bench.drivers[RECEIVE].set_used_event(event);
            bench.offer(4, 2048);
            // Three buffers for the first frame, one for the second.
            bench.host_sends(&frame(1, 6000));
            bench.host_sends(&frame(2, 100));
            assert_eq!(bench.ready().has(RECEIVE), wanted, "{event}");
            assert_eq!(bench.drivers[RECEIVE].used().len(), 4);
        });
    }
}

#[test]
fn a_receive_buffer_without_room_for_the_header_breaks_the_ring() {
    with_tap(MERGE, 256, |mut bench| {
        bench.offer(1, 11);
        bench.host_sends(&frame(1, 100));
        let error = ready(&mut bench.net, &mut bench.drivers, &bench.memory).unwrap_err();
        assert_eq!(error.to_string(), "queue 0: a receive buffer of 11 bytes");
    });
}

#[test]
fn offloads_that_do_not_go_together_are_survived() {
    with_tap(0, 256, |mut bench| {
        let all = bench.net.features();
        bench.net.activate(all);
        bench.net.tap.set_offloads(all).unwrap();
        // Segments cannot be had without checksums.
        bench.net.activate(1 << VIRTIO_NET_F_GUEST_TSO4);
        bench.net.reset();
        bench.net.tap.set_offloads(0).unwrap();
    });
}

#[test]
fn the_tap_becomes_readable_for_each_frame() {
    with_tap(0, 256, |bench| {
        let readable = |bench: &Bench| {
            let mut fds = [PollFd::new(&bench.net.tap, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
        };
        assert!(!readable(&bench));
        bench.host_sends(&frame(1, 60));
        assert!(readable(&bench));
    });
}

#[test]
fn the_mac_address_is_told() {
    with_tap(0, 256, |bench| {
        let mut data = [0xff; 8];
        bench.net.read_config(0, &mut data);
        assert_eq!(data, [2, 0, 0, 0, 0, 9, 0, 0]);
        assert_eq!(bench.net.name(), "net3");
    });
}

#[test]
fn what_was_inherited_and_is_no_tap_is_refused() {
    let inherit = |file: std::fs::File| {
        let fd = file.into_raw_fd();
        Tap::take(&TapSource::Descriptor(fd)).unwrap_err()
    };
    assert!(matches!(inherit(std::fs::File::open("/dev/null").unwrap()), TapError::Inherit { .. }));
    // Nobody has attached it to anything.
    match std::fs::File::open("/dev/net/tun") {
        Ok(file) => assert!(matches!(inherit(file), TapError::Inherit { .. })),
        Err(why) => eprintln!("SKIPPED: a descriptor of the tun driver: {why}"),
    }
    assert!(matches!(Tap::take(&TapSource::Descriptor(9999)), Err(TapError::Inherit { .. })));
}

#[test]
fn what_is_no_tap_is_refused() {
    with_tap(0, 256, |_bench| {
        let open = |tap: &str| Tap::take(&TapSource::Name(tap.to_owned())).unwrap_err();
        assert!(matches!(open("nothing"), TapError::Missing { .. }));
        assert!(matches!(open("lo"), TapError::Attach { .. }));
        // The bench's device is attached to it.
        assert!(matches!(open(TAP), TapError::Attach { .. }));
        assert!(
            Command::new("ip")
                .args(["link", "show", "nothing"])
                .output()
                .is_ok_and(|output| !output.status.success())
        );
    });
}
