//! Everything of the host that the machine uses, opened before QEMU is started and the jail is entered.
//!
//! QEMU runs as a user without rights, so it is given descriptors instead of paths.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;
use sandbox_vmm_api::{SHARE_LINK, VSOCK_LINK, VsockConfig, socket};
use vm_memory::GuestAddress;

use super::entry;
use super::error::Error;
use crate::config::Config;
use crate::devices::blk::image::Image;
use crate::devices::net::tap::Tap;
use crate::jail;
use crate::legacy::console::ConsoleFile;

/// What has been opened.
pub struct Opened {
    /// The program that QEMU boots.
    pub entry: File,
    /// Guest memory, mapped by nobody yet.
    pub memory: File,
    /// The machine protocol.
    pub qmp: Pair,
    /// The console and the file for it, where one was asked for.
    pub console: Option<(Pair, ConsoleFile)>,
    /// The vsock device.
    pub vsock: Option<VsockLink>,
    /// The file device.
    pub share: Option<Link>,
    /// Disks.
    pub disks: Vec<Image>,
    /// Network interfaces.
    pub taps: Vec<Tap>,
    /// `/proc/self/fd`.
    pub descriptors: File,
}

/// The descriptors that QEMU inherits, by their purpose.
pub struct Inherited<'a> {
    pub entry: BorrowedFd<'a>,
    pub memory: BorrowedFd<'a>,
    pub qmp: BorrowedFd<'a>,
    pub console: Option<BorrowedFd<'a>>,
    pub vsock: Option<BorrowedFd<'a>>,
    pub share: Option<BorrowedFd<'a>>,
    pub disks: Vec<BorrowedFd<'a>>,
    pub taps: Vec<BorrowedFd<'a>>,
}

impl Inherited<'_> {
    /// All of them.
    pub fn all(&self) -> Vec<BorrowedFd<'_>> {
        [self.entry, self.memory, self.qmp]
            .into_iter()
            .chain([self.console, self.vsock, self.share].into_iter().flatten())
            .chain(self.disks.iter().copied())
            .chain(self.taps.iter().copied())
            .collect()
    }
}

impl Opened {
    /// Opens everything, for a kernel that is entered here.
    pub fn open(config: &Config, kernel: GuestAddress) -> Result<Self, Error> {
        Ok(Self {
            entry: entry::file(kernel).map_err(Error::Entry)?,
            memory: guest_memory(config.memory_bytes())?,
            qmp: Pair::new("control")?,
            console: config.console().map(open_console).transpose()?,
            vsock: config.vsock().map(|vsock| VsockLink::new(vsock, config)).transpose()?,
            share: (!config.shares().is_empty()).then(|| Link::new(SHARE_LINK, config)).transpose()?,
            disks: config.disks().iter().map(Image::open).collect::<Result<_, _>>()?,
            taps: config.nets().iter().map(|net| Tap::take(&net.tap)).collect::<Result<_, _>>()?,
            descriptors: File::open("/proc/self/fd").map_err(Error::Descriptors)?,
        })
    }

    /// What QEMU inherits of it.
    pub fn inherited(&self) -> Inherited<'_> {
        Inherited {
            entry: self.entry.as_fd(),
            memory: self.memory.as_fd(),
            qmp: self.qmp.theirs.as_fd(),
            console: self.console.as_ref().map(|(pair, _)| pair.theirs.as_fd()),
            vsock: self.vsock.as_ref().map(|vsock| vsock.link.theirs.as_fd()),
            share: self.share.as_ref().map(|link| link.theirs.as_fd()),
            disks: self.disks.iter().map(AsFd::as_fd).collect(),
            taps: self.taps.iter().map(AsFd::as_fd).collect(),
        }
    }
}

fn guest_memory(bytes: u64) -> Result<File, Error> {
    let failed = |error: io::Error| Error::Memory { bytes, error };
    let memfd = rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC)
        .map_err(|error| failed(error.into()))?;
    let memory = File::from(memfd);
    memory.set_len(bytes).map_err(failed)?;
    Ok(memory)
}

fn open_console(path: &Path) -> Result<(Pair, ConsoleFile), Error> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| Error::Console { path: path.to_owned(), error })?;
    Ok((Pair::new("console")?, ConsoleFile::new(file)))
}

/// The two ends of a connection.
pub struct Pair {
    /// This process's.
    pub ours: UnixStream,
    /// QEMU's.
    pub theirs: OwnedFd,
}

impl Pair {
    fn new(what: &'static str) -> Result<Self, Error> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| Error::Socket { what, error })?;
        Ok(Self { ours, theirs: theirs.into() })
    }
}

/// The way between QEMU and a device of ours: a listener with one connection waiting, and its other end.
///
/// The library takes connections from listeners only. The socket's name exists for the time of this call, in
/// the directory of the control socket, which is the sandbox's own.
pub struct Link {
    /// This process's end.
    pub ours: UnixListener,
    /// QEMU's end.
    pub theirs: OwnedFd,
}

impl Link {
    fn new(what: &'static str, config: &Config) -> Result<Self, Error> {
        let failed = |error| Error::Socket { what, error };
        let path = config.control_socket().with_extension(what);
        let ours = socket::bind(&path).map_err(failed)?;
        let theirs = socket::connect(&path);
        std::fs::remove_file(&path).map_err(failed)?;
        Ok(Self { ours, theirs: theirs.map_err(failed)?.into() })
    }
}

/// What the vsock device needs.
pub struct VsockLink {
    /// The way to QEMU.
    pub link: Link,
    /// The guest's context id.
    pub cid: u32,
    /// Where host programs connect.
    pub listener: UnixListener,
    /// Where host programs listen, seen from the jail; `_` and a port are added.
    pub dial: PathBuf,
}

impl VsockLink {
    fn new(vsock: &VsockConfig, config: &Config) -> Result<Self, Error> {
        let listener = socket::bind(&vsock.socket)
            .map_err(|error| Error::Listen { path: vsock.socket.clone(), error })?;
        let dial = Path::new(jail::VSOCK).join(vsock.socket.file_name().unwrap_or_default());
        Ok(Self { link: Link::new(VSOCK_LINK, config)?, cid: vsock.cid, listener, dial })
    }
}
