//! The software machine: the guest on QEMU's TCG, with our own devices.
//!
//! QEMU is the CPU, the memory and the board (`-M microvm`); the vsock and the file device are the same code as
//! on the KVM machine, served to it over vhost-user. QEMU is a child of this process that inherits a handful of
//! descriptors, dies with it, and is confined by its own seccomp filter.
//!
//! Guest memory is a memfd of ours. QEMU and the devices map it; this process reads the panic log from it when
//! the guest has ended, and how much of it is resident.

mod arguments;
mod child;
mod layout;
mod qmp;
mod tsc;
mod vhost_user;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::fs::MemfdFlags;
use sandbox_vmm_api::{
    ExitReason, MachineKind, PANIC_LOG_BYTES, POWER_OFF_VALUE, SHARE_TAG, Statistics, VsockConfig,
};

use crate::config::Config;
use crate::fs::Fs;
use crate::jail;
use crate::machine::{Machine, MachineError};
use crate::panic_log;
use crate::timeline::Timeline;
use crate::vsock::Vsock;
use child::Qemu;
use layout::Layout;
use qmp::Qmp;
use vhost_user::Served;

/// The program, as Debian's package `qemu-system-x86` installs it.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU's exit status for a byte that the guest writes to `isa-debug-exit`: twice the byte, plus one.
const POWER_OFF_STATUS: i32 = (POWER_OFF_VALUE as i32) << 1 | 1;

/// Why the machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that is booted could not be opened.
    #[error("opening the guest {what} {path}: {error}", path = .path.display())]
    Boot {
        /// `kernel` or `image`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The guest image does not fit.
    #[error(
        "the guest image of {image} bytes does not fit into {memory} bytes of guest memory: give it more"
    )]
    Image {
        /// Bytes of the image.
        image: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
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
    /// QEMU is not there.
    #[error("{PROGRAM} is not installed: install it with `apt install qemu-system-x86`")]
    NotInstalled,
    /// QEMU could not be executed.
    #[error("starting {PROGRAM}: {0}")]
    Start(#[source] io::Error),
    /// The jail could not be made.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// The file device could not be made.
    #[error(transparent)]
    Fs(#[from] crate::fs::Error),
    /// A device could not be served.
    #[error(transparent)]
    Serve(#[from] vhost_user::Error),
}

/// The software machine.
pub struct QemuMachine {
    qemu: Qemu,
    qmp: Qmp,
    memory: File,
    layout: Layout,
    devices: Vec<Served>,
    stopped: Stopped,
}

/// Whether the machine's end was our doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    No,
    ByUs,
}

impl QemuMachine {
    /// Starts QEMU, with the guest paused, and moves this process into its jail.
    ///
    /// To be called on the process's first thread while there is no other: QEMU is killed when that thread
    /// ends, and a jail is entered by one thread alone.
    pub fn start(config: &Config, timeline: &mut Timeline) -> Result<Self, Error> {
        let tsc = tsc::Measurement::start();
        let layout = check_boot_files(config)?;
        let memory = guest_memory(config.memory_bytes())?;
        let qmp = socket_pair()?;
        let vsock = config.vsock().map(|vsock| VsockLink::new(vsock, config)).transpose()?;
        let share = (!config.shares().is_empty()).then(|| Link::new("share", config)).transpose()?;
        let descriptors =
            File::open("/proc/self/fd").map_err(|error| Error::Socket { what: "descriptor", error })?;
        let guest = arguments::Guest { layout, tsc_khz: tsc.map(tsc::Measurement::finish) };
        timeline.step("prepare");

        let fds = arguments::Descriptors {
            memory: memory.as_fd(),
            qmp: qmp.theirs.as_fd(),
            vsock: vsock.as_ref().map(|vsock| vsock.link.theirs.as_fd()),
            share: share.as_ref().map(|link| link.theirs.as_fd()),
        };
        let mut qemu =
            Qemu::start(PROGRAM, &arguments::qemu(config, &guest, &fds), &fds.all()).map_err(start_error)?;
        timeline.step("start qemu");

        let vsock_directory = config.vsock().and_then(|vsock| vsock.socket.parent());
        jail::enter(config.shares(), vsock_directory)?;
        timeline.step("enter the jail");

        let mut devices = Vec::new();
        if let Some(VsockLink { link, cid, listener, dial }) = vsock {
            let vsock =
                Vsock::new(cid, listener, dial).map_err(|error| Error::Socket { what: "vsock", error })?;
            devices.push(Served::start(Box::new(vsock), link.ours)?);
        }
        if let Some(link) = share {
            let fs = Fs::new(SHARE_TAG, Path::new(jail::SHARE), descriptors)?;
            devices.push(Served::start(Box::new(fs), link.ours)?);
        }
        qemu.listen().map_err(Error::Start)?;
        let qmp = Qmp::new(qmp.ours)
            .map_err(|error| Error::Socket { what: "control", error: io::Error::other(error) })?;
        timeline.step("serve devices");
        Ok(Self { qemu, qmp, memory, layout, devices, stopped: Stopped::No })
    }

    /// The bytes of the panic log, if they can be read.
    fn panic_log(&self) -> Vec<u8> {
        let mut log = vec![0; PANIC_LOG_BYTES as usize];
        match self.memory.read_exact_at(&mut log, self.layout.panic_log) {
            Ok(()) => log,
            Err(error) => {
                tracing::warn!(%error, "reading the guest's panic log");
                Vec::new()
            }
        }
    }

    /// Why QEMU ended, by its status and its last event.
    fn judge(&mut self, status: ExitStatus) -> ExitReason {
        if self.stopped == Stopped::ByUs {
            return ExitReason::Stopped;
        }
        if status.code() == Some(POWER_OFF_STATUS) {
            return ExitReason::PowerOff;
        }
        match self.qmp.shutdown_reason().as_deref() {
            Some("guest-reset") => self.judge_reset(),
            Some("guest-shutdown") => ExitReason::PowerOff,
            _ => ExitReason::Failed { message: failure(status, &self.qemu.last_words()) },
        }
    }

    /// A panic ends in a triple fault, which is a reset here.
    fn judge_reset(&self) -> ExitReason {
        match panic_log::parse(&self.panic_log()) {
            Some(console) => ExitReason::Panic { console },
            None => ExitReason::Reset,
        }
    }
}

impl Machine for QemuMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Qemu
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.qmp.run("cont").map_err(|error| self.command_error("resuming the guest", &error))
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.qmp.run("stop").map_err(|error| self.command_error("pausing the guest", &error))
    }

    fn statistics(&mut self) -> Result<Statistics, MachineError> {
        /// The unit of `st_blocks`.
        const BLOCK_BYTES: u64 = 512;
        let blocks = self
            .memory
            .metadata()
            .map_err(|error| MachineError::new("measuring guest memory", error))?
            .blocks();
        Ok(Statistics {
            memory_resident_bytes: blocks * BLOCK_BYTES,
            devices: self.devices.iter().map(Served::statistics).collect::<BTreeMap<_, _>>(),
            ..Statistics::default()
        })
    }

    fn stop(&mut self) {
        self.stopped = Stopped::ByUs;
        self.qemu.kill();
        self.devices.clear();
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.qemu.pidfd()
    }

    fn exit_reason(&mut self) -> ExitReason {
        let status = self.qemu.wait();
        let reason = self.judge(status);
        self.devices.clear();
        reason
    }
}

impl QemuMachine {
    /// A command that failed because QEMU has died says why it died.
    fn command_error(&self, what: &'static str, error: &qmp::Error) -> MachineError {
        let words = self.qemu.last_words();
        if words.is_empty() {
            MachineError::new(what, error)
        } else {
            MachineError::new(what, format!("{error}: {words}"))
        }
    }
}

/// What a QEMU that ended by itself is reported as.
fn failure(status: ExitStatus, last_words: &str) -> String {
    let how = match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with status {code}"),
        (None, None) => "ended".to_owned(),
    };
    if last_words.is_empty() { format!("QEMU {how}") } else { format!("QEMU {how}: {last_words}") }
}

fn start_error(error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound { Error::NotInstalled } else { Error::Start(error) }
}

/// Finds out early, and by name, what QEMU would only complain about.
fn check_boot_files(config: &Config) -> Result<Layout, Error> {
    let size = |what, path: &Path| {
        let failed = |error| Error::Boot { what, path: path.to_owned(), error };
        File::open(path).and_then(|file| file.metadata()).map(|data| data.len()).map_err(failed)
    };
    size("kernel", config.kernel())?;
    let image = size("image", config.image())?;
    Layout::new(config.memory_bytes(), image).ok_or(Error::Image { image, memory: config.memory_bytes() })
}

/// Guest memory, mapped by nobody yet.
fn guest_memory(bytes: u64) -> Result<File, Error> {
    let failed = |error: io::Error| Error::Memory { bytes, error };
    let memfd = rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC)
        .map_err(|error| failed(error.into()))?;
    let memory = File::from(memfd);
    memory.set_len(bytes).map_err(failed)?;
    Ok(memory)
}

/// The two ends of a connection.
struct Pair {
    ours: UnixStream,
    theirs: OwnedFd,
}

fn socket_pair() -> Result<Pair, Error> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| Error::Socket { what: "control", error })?;
    Ok(Pair { ours, theirs: theirs.into() })
}

/// The way between QEMU and a device of ours: a listener with one connection waiting, and its other end.
///
/// The library takes connections from listeners only. The socket's name exists for the time of this call, in
/// the directory of the control socket, which is the sandbox's own.
struct Link {
    ours: UnixListener,
    theirs: OwnedFd,
}

impl Link {
    fn new(what: &'static str, config: &Config) -> Result<Self, Error> {
        let failed = |error| Error::Socket { what, error };
        let path = config.control_socket().with_extension(what);
        let ours = UnixListener::bind(&path).map_err(failed)?;
        let theirs = UnixStream::connect(&path);
        std::fs::remove_file(&path).map_err(failed)?;
        Ok(Self { ours, theirs: theirs.map_err(failed)?.into() })
    }
}

/// What the vsock device needs from outside the jail.
struct VsockLink {
    link: Link,
    cid: u32,
    listener: UnixListener,
    dial: PathBuf,
}

impl VsockLink {
    fn new(vsock: &VsockConfig, config: &Config) -> Result<Self, Error> {
        let listener =
            UnixListener::bind(&vsock.socket).map_err(|error| Error::Socket { what: "vsock", error })?;
        let dial = Path::new(jail::VSOCK).join(vsock.socket.file_name().unwrap_or_default());
        Ok(Self { link: Link::new("vsock", config)?, cid: vsock.cid, listener, dial })
    }
}
