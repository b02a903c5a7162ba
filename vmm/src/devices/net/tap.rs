//! The host's end of a network interface: a tap device.
//!
//! A tap is a network interface whose wire is a descriptor: each read takes one frame that the host sent to
//! it, each write gives it one. With `IFF_VNET_HDR` every frame has the virtio-net header in front, the same
//! that stands in the guest's buffers, so frames and headers go through as they are: the kernel checks the
//! header that a guest made up, as it does for vhost.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use sandbox_vmm_api::TapSource;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// The bytes of the header before each frame: `virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;

/// What the guest can be given unfinished (the bit of the feature), and how the kernel is told.
const OFFLOADS: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];

/// Segmentation of UDP, which kernels before 6.2 do not have, neither from nor to a tap.
const UDP_SEGMENTATION: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no interface of that name. (Attaching would make one.)
    #[error("network interface {name}: {error}; the tap must exist before the machine is started")]
    Missing {
        /// The interface.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// The tun driver cannot be reached.
    #[error("cannot open /dev/net/tun: {0}; the host needs the tun driver (`modprobe tun`)")]
    Driver(#[source] io::Error),
    /// The interface could not be attached to.
    #[error(
        "cannot attach to tap {name}: {error}; it must be a tap of one queue (`ip tuntap add {name} mode \
         tap`) that no other program uses, and belong to this user"
    )]
    Attach {
        /// The interface.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// An inherited descriptor is of no use.
    #[error(
        "descriptor {fd} was to be a tap with virtio-net headers that the runtime has attached to: {error}"
    )]
    Inherit {
        /// Its number.
        fd: RawFd,
        /// Why.
        error: io::Error,
    },
    /// The tap could not be set up.
    #[error("cannot set {what} of tap {name}: {error}")]
    Configure {
        /// What.
        what: &'static str,
        /// The interface.
        name: String,
        /// Why.
        error: io::Error,
    },
}

/// Whether a tap segments UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpSegmentation {
    /// It does.
    Supported,
    /// It does not.
    Missing,
}

/// An attached tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    udp_segmentation: UdpSegmentation,
}

impl Tap {
    /// Takes the tap of an interface, all offloads off. A descriptor can be taken once.
    pub fn take(source: &TapSource) -> Result<Self, TapError> {
        match source {
            TapSource::Name(name) => Self::open(name),
            TapSource::Descriptor(fd) => {
                let (file, name) = inherit(*fd).map_err(|error| TapError::Inherit { fd: *fd, error })?;
                Self::set_up(file, &name)
            }
        }
    }

    /// Attaches to an existing tap, all offloads off.
    fn open(name: &str) -> Result<Self, TapError> {
        check_exists(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Driver)?;
        attach(&file, name).map_err(|error| TapError::Attach { name: name.to_owned(), error })?;
        Self::set_up(file, name)
    }

    fn set_up(file: File, name: &str) -> Result<Self, TapError> {
        let mut tap = Self { file, name: name.to_owned(), udp_segmentation: UdpSegmentation::Missing };
        tap.set_header_size()?;
        if tap.set_flags(libc::TUN_F_CSUM | UDP_SEGMENTATION).is_ok() {
            tap.udp_segmentation = UdpSegmentation::Supported;
        }
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// Whether it segments UDP.
    pub fn udp_segmentation(&self) -> UdpSegmentation {
        self.udp_segmentation
    }

    /// Lets the host send what a guest with these features can take: frames without checksum, frames larger
    /// than the wire's.
    pub fn set_offloads(&self, features: u64) -> Result<(), TapError> {
        let accepted = |&(bit, _): &(u32, u32)| features & (1 << bit) != 0;
        let flags = OFFLOADS.iter().filter(|pair| accepted(pair)).map(|&(_, flag)| flag).sum();
        self.set_flags(flags).map_err(|error| self.failed("the offloads", error))
    }

    fn set_flags(&self, flags: u32) -> io::Result<()> {
        // SAFETY: this request takes its argument by value and touches no memory of ours.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn set_header_size(&self) -> Result<(), TapError> {
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: the request reads one int, which lives until it returns.
        let outcome =
            check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) });
        outcome.map_err(|error| self.failed("the header size", error))
    }

    fn failed(&self, what: &'static str, error: io::Error) -> TapError {
        TapError::Configure { what, name: self.name.clone(), error }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check_exists(name: &str) -> Result<(), TapError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .and_then(|socket| netdevice::name_to_index(socket, name))
        .map(drop)
        .map_err(|errno| TapError::Missing { name: name.to_owned(), error: errno.into() })
}

/// Takes a descriptor that the runtime has attached to a tap, and the tap's name.
fn inherit(fd: RawFd) -> io::Result<(File, String)> {
    const WANTED: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: the number is only looked at; a closed one makes the call fail.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: it is open, the runtime put it there for this interface, and no other has the same: see `Config`.
    let file = unsafe { File::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&file, true)?;
    let mut request = no_request();
    // SAFETY: the request writes one `ifreq`, which lives until it returns.
    check(unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: the kernel has filled in the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & WANTED != WANTED {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
    Ok((file, String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned()))
}

fn no_request() -> libc::ifreq {
    // SAFETY: all zeroes are a value of this structure of integers.
    unsafe { std::mem::zeroed() }
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    let mut request = no_request();
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes one `ifreq`, which lives until it returns.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
