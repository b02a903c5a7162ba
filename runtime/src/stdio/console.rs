//! A terminal made for an engine: it gets the master over its console socket, we keep the slave.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use sandbox_vmm_api::socket;

use crate::descriptor;

/// Why an engine could not be given a terminal.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} for the console socket {}: {error}", path.display())]
pub struct ConsoleError {
    path: PathBuf,
    step: &'static str,
    error: io::Error,
}

/// Makes a terminal and sends its master over a socket, with its name as the message, as runc does.
///
/// The slave becomes this process's controlling terminal, so that a change of the window's size is a signal to
/// it, where the process is the leader of a session without one.
pub fn open(path: &Path) -> Result<OwnedFd, ConsoleError> {
    let error = |step| move |error: io::Error| ConsoleError { path: path.into(), step, error };
    let (master, slave, name) = pair().map_err(error("make a terminal"))?;
    let connection = socket::connect(path).map_err(error("connect"))?;
    descriptor::send(&connection, &name, &[master.as_fd()]).map_err(error("send the terminal"))?;
    // A command that a shell runs is no leader: it has to do without the signal.
    let _ = rustix::process::ioctl_tiocsctty(&slave);
    Ok(slave)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd, Vec<u8>)> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(&name, flags, Mode::empty())?;
    // The guest's terminal does what terminals do; this one passes bytes on.
    let mut raw = rustix::termios::tcgetattr(&slave)?;
    raw.make_raw();
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &raw)?;
    Ok((master, slave, name.into_bytes()))
}
