//! A network interface through real rings, and the host at the other end of its tap, which sends and receives meanwhile.
//!
//! The tap is a real one, in a network namespace that holds nothing else: what a guest makes up in the header before a
//! frame is for the host's kernel to check. Making it takes root.

#![no_main]

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::process::Command;

use libfuzzer_sys::fuzz_target;
use sandbox_fuzz::driver::Driver;
use sandbox_fuzz::input::Input;
use sandbox_vmm::config::{MacAddress, Net as Wanted};
use sandbox_vmm::devices::net::Net;
use sandbox_vmm_api::TapSource;

const TAP: &str = "fuzz0";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// The most steps of an input.
const STEPS: usize = 64;
/// The bytes of the header before a frame.
const HEADER_BYTES: usize = 12;

const TO_GUEST: u16 = 0;
const FROM_GUEST: u16 = 1;

struct Bench {
    driver: Driver,
    host: File,
}

impl Bench {
    fn new() -> io::Result<Self> {
        // SAFETY: the call touches no memory.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let tap = tap()?;
        let up = Command::new("ip").args(["link", "set", TAP, "up"]).status()?;
        assert!(up.success(), "ip link set {TAP} up");
        let wanted = Wanted { tap: TapSource::Descriptor(tap.into_raw_fd()), mac: MacAddress(MAC) };
        let net = Net::open(0, &wanted).map_err(io::Error::other)?;
        Ok(Self { driver: Driver::new(Box::new(net)), host: packets()? })
    }

    fn run(&mut self, input: &mut Input<'_>) {
        self.driver.bring_up(input.u64());
        for _ in 0..STEPS {
            if input.is_empty() {
                return;
            }
            match input.u8() % 8 {
                0 | 1 => self.host_sends(input),
                2 => self.host_receives(),
                3 => {
                    let room = u32::from(input.u16() % 0x1000);
                    self.driver.offer(TO_GUEST, &[], &[room]);
                    self.driver.notify(TO_GUEST);
                }
                4 | 5 => {
                    let frame = frame(input);
                    // The header by itself, or with the frame.
                    match input.u8() % 2 {
                        0 => self.driver.offer(FROM_GUEST, &[&frame], &[]),
                        _ => {
                            let (header, rest) = frame.split_at(HEADER_BYTES);
                            self.driver.offer(FROM_GUEST, &[header, rest], &[]);
                        }
                    }
                    self.driver.notify(FROM_GUEST);
                }
                6 => self.driver.ready(),
                _ => self.driver.step(input),
            }
        }
    }

    fn host_sends(&self, input: &mut Input<'_>) {
        let len = input.u16() % 1500;
        let frame = [&MAC[..], input.bytes(len.into())].concat();
        // SAFETY: the kernel reads so many bytes of the frame, which lives until it returns.
        unsafe { libc::send(self.host.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_DONTWAIT) };
        self.driver.ready();
    }

    fn host_receives(&self) {
        let mut frame = [0u8; 2048];
        // SAFETY: the kernel writes at most so many bytes of the buffer.
        while unsafe {
            libc::recv(self.host.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), libc::MSG_DONTWAIT)
        } > 0
        {}
    }
}

/// A frame of the guest with its header, whose fields are mostly those that mean something.
fn frame(input: &mut Input<'_>) -> Vec<u8> {
    const SEGMENTATION: [u8; 6] = [0, 1, 3, 4, 5, 0x81];
    const TYPES: [[u8; 2]; 4] = [[0x08, 0x00], [0x86, 0xdd], [0x81, 0x00], [0x88, 0xb5]];
    let (mode, len) = (input.u8(), input.u16() % 3000);
    let mut bytes = vec![mode & 3, SEGMENTATION[usize::from(mode >> 2) % SEGMENTATION.len()]];
    for _ in 0..4 {
        // The header's length, a segment's, and where the checksum starts and goes.
        bytes.extend(input.u16().to_le_bytes());
    }
    bytes.extend([0, 0]);
    bytes.extend([0xff; 6]);
    bytes.extend(MAC);
    bytes.extend(TYPES[usize::from(mode >> 5) % TYPES.len()]);
    bytes.extend(input.bytes(len.into()));
    bytes
}

/// A new tap, whose frames have the virtio-net header.
fn tap() -> io::Result<File> {
    let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all zeroes are a value of this structure of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request reads and writes one `ifreq`, which lives until it returns.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(tap)
}

/// A socket that sends and receives whole frames on the tap.
fn packets() -> io::Result<File> {
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the call touches no memory.
    let socket =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, every_protocol.into()) };
    check(socket)?;
    // SAFETY: it was just made, and nobody else has it.
    let socket = unsafe { File::from_raw_fd(socket) };
    // SAFETY: all zeroes are a value of this structure of integers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every_protocol;
    // SAFETY: the name is terminated.
    address.sll_ifindex = unsafe { libc::if_nametoindex(c"fuzz0".as_ptr()) }.cast_signed();
    let bytes = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is of the length that is given, and lives until the call returns.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), bytes) })?;
    Ok(socket)
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new().expect("root can make a network namespace with a tap"));
}

fuzz_target!(|data: &[u8]| BENCH.with_borrow_mut(|bench| bench.run(&mut Input::new(data))));
