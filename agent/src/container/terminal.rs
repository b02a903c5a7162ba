//! The terminal of a process, from the container's own `/dev/pts`.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::Process;
use rustix::fs::{FileType, OFlags, fstat, fstatfs, major, minor};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::beneath::{BeneathError, Root};

/// The number that `statfs` gives for devpts.
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// A terminal could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    /// There is no `/dev/pts/ptmx`.
    #[error("process.terminal needs a devpts mount at /dev/pts (add it to mounts): {0}")]
    NoDevpts(#[from] BeneathError),
    /// What is there is something else.
    #[error("process.terminal needs a devpts mount at /dev/pts: /dev/pts/ptmx is something else")]
    NotDevpts,
    /// A step failed.
    #[error("cannot {step}: {source}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
}

fn step(step: &'static str) -> impl Fn(Errno) -> TerminalError {
    move |source| TerminalError::Step { step, source }
}

/// Both ends of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The agent's.
    pub master: OwnedFd,
    /// The process's.
    pub slave: OwnedFd,
}

impl Terminal {
    /// Opens a new terminal of the size that the process wants.
    pub fn open(root: &Root, process: &Process) -> Result<Self, TerminalError> {
        let path = Path::new("/dev/pts/ptmx");
        check(&root.open(path, OFlags::PATH)?)?;
        let master = root.open(path, OFlags::RDWR | OFlags::NOCTTY)?;
        unlockpt(&master).map_err(step("unlock a terminal"))?;
        let slave =
            ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
                .map_err(step("open a terminal"))?;
        if let Some(size) = process.console_size() {
            let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
            let size = Winsize {
                ws_row: clamp(size.height()),
                ws_col: clamp(size.width()),
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            tcsetwinsize(&master, size).map_err(step("set the size of a terminal"))?;
        }
        Ok(Self { master, slave })
    }

    /// Makes it the controlling terminal of this process, which leads a session, and its standard streams.
    pub fn take(&self) -> Result<(), TerminalError> {
        // SAFETY: the call has no memory effects.
        if unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY, 0) } != 0 {
            return Err(step("make the terminal the controlling one")(
                Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO),
            ));
        }
        let slave = self.slave.as_fd();
        rustix::stdio::dup2_stdin(slave)
            .and_then(|()| rustix::stdio::dup2_stdout(slave))
            .and_then(|()| rustix::stdio::dup2_stderr(slave))
            .map_err(step("make the terminal the standard streams"))
    }
}

/// The root is hostile: what it calls `ptmx` must be a devpts's.
fn check(found: &OwnedFd) -> Result<(), TerminalError> {
    let stat = fstat(found).map_err(step("look at /dev/pts/ptmx"))?;
    let file_system = fstatfs(found).map_err(step("look at /dev/pts/ptmx"))?;
    let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2);
    if device && file_system.f_type == DEVPTS_MAGIC { Ok(()) } else { Err(TerminalError::NotDevpts) }
}
