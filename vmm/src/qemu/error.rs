//! Why the software machine could not be started.

use std::io;
use std::path::PathBuf;

use super::arguments::MAX_DEVICES;
use super::{PROGRAM, vhost_user};
use crate::boot::BootError;
use crate::devices::blk::image::ImageError;
use crate::devices::net::tap::TapError;
use crate::memory::MapError;
use crate::{fs, jail};

/// The step that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or the image are no good.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The program that enters the kernel could not be made.
    #[error("making the program that enters the guest kernel: {0}")]
    Entry(#[source] io::Error),
    /// More devices than the board has room for.
    #[error("{0} devices asked for: the software machine has room for {MAX_DEVICES}")]
    TooManyDevices(usize),
    /// A limit that QEMU's network device does not know.
    #[error(
        "the software machine has no limit for network interfaces: leave it out, or limit the interface of the \
         network namespace with tc"
    )]
    NetRate,
    /// Guest memory could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Guest memory could not be made.
    #[error("making {bytes} bytes of guest memory: {error}")]
    Memory {
        /// Its size.
        bytes: u64,
        /// Why.
        error: io::Error,
    },
    /// A socket between QEMU and this process could not be made.
    #[error("making the {what} socket of QEMU: {error}")]
    Socket {
        /// What it is for.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The vsock device's socket for host programs could not be made.
    #[error("listening for connections to the guest at {path}: {error}", path = .path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The process's own descriptors could not be reached.
    #[error("opening /proc/self/fd: {0}")]
    Descriptors(#[source] io::Error),
    /// The console file could not be made.
    #[error("cannot write the console to {path}: {error}", path = .path.display())]
    Console {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A disk could not be opened.
    #[error(transparent)]
    Disk(#[from] ImageError),
    /// A tap could not be attached to.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// QEMU is not there.
    #[error(
        "{PROGRAM} is not installed below /usr or /bin, where it can be confined: `apt install qemu-system-x86`"
    )]
    NotInstalled,
    /// QEMU could not be executed.
    #[error("starting {PROGRAM}: {0}")]
    Start(#[source] io::Error),
    /// The jail could not be made.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// The process could not take ids of its own.
    #[error("taking ids of its own for the machine's process: {0}")]
    Identity(#[source] io::Error),
    /// The file device could not be made.
    #[error(transparent)]
    Fs(#[from] fs::Error),
    /// A device could not be served.
    #[error(transparent)]
    Serve(#[from] vhost_user::Error),
}
