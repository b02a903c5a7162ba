//! The QEMU process: started with nothing of ours but what is passed to it, watched, and killed.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::process::{Pid, PidfdFlags};

use super::confinement;
pub use super::confinement::NOBODY;
use crate::confine::{self, Kind};

/// How much of QEMU's last words is kept.
const LAST_WORDS_BYTES: usize = 4096;

/// A running QEMU. Dropping it kills it.
pub struct Qemu {
    child: Child,
    pidfd: OwnedFd,
    last_words: Arc<Mutex<VecDeque<u8>>>,
    listener: Option<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Qemu {
    /// Starts QEMU as `user`, with `arguments`; it inherits `descriptors`, each under its own number, and no other.
    ///
    /// It is killed when the calling *thread* ends: that has to be one that lives as long as the process.
    pub fn start(
        program: &str,
        arguments: &[String],
        descriptors: &[BorrowedFd<'_>],
        user: u32,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Signals of the terminal are for the runtime.
        command.process_group(0);
        let inherited: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let parent = std::process::id();
        // SAFETY: between fork and exec the closure makes system calls only, and reads two values that were
        // copied into it.
        unsafe { command.pre_exec(move || prepare(parent, &inherited, user)) };
        let mut child = command.spawn()?;
        let pidfd = Pid::from_raw(child.id() as i32)
            .ok_or(io::ErrorKind::InvalidData.into())
            .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?))
            .inspect_err(|_: &io::Error| {
                let _ = child.kill();
                let _ = child.wait();
            })?;
        let last_words = Arc::default();
        Ok(Self { child, pidfd, last_words, listener: None, status: None })
    }

    /// Starts the thread that reads QEMU's standard error; apart from the start itself since a process must
    /// have no second thread before it enters its jail.
    pub fn listen(&mut self) -> io::Result<()> {
        let Some(mut stderr) = self.child.stderr.take() else { return Ok(()) };
        let words = self.last_words.clone();
        let listener = std::thread::Builder::new().name("qemu-stderr".to_owned()).spawn(move || {
            confine::enter(Kind::Listener);
            let mut chunk = [0; 1024];
            while let Ok(length) = stderr.read(&mut chunk) {
                let heard = chunk.get(..length).unwrap_or_default();
                if heard.is_empty() {
                    break;
                }
                tracing::debug!(text = %String::from_utf8_lossy(heard).trim_end(), "qemu");
                let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
                words.extend(heard);
                let excess = words.len().saturating_sub(LAST_WORDS_BYTES);
                words.drain(..excess);
            }
        })?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Becomes readable when QEMU has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills QEMU if it still runs; when this returns, it is gone.
    pub fn kill(&mut self) -> ExitStatus {
        let _ = self.child.kill();
        self.wait()
    }

    /// Waits for QEMU's end.
    pub fn wait(&mut self) -> ExitStatus {
        let status = self.status.unwrap_or_else(|| {
            // Waiting for a child that is ours and not yet reaped cannot fail.
            self.child.wait().unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL))
        });
        self.status = Some(status);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
        status
    }

    /// The end of what QEMU wrote to its standard error, on one line.
    pub fn last_words(&self) -> String {
        let words = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = words.as_slices();
        let text = [front, back].concat();
        let lines: Vec<_> = String::from_utf8_lossy(&text).lines().map(printable).collect();
        lines.join("; ")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the guest may have had a hand in does not reach a terminal raw.
fn printable(line: &str) -> String {
    line.chars().filter(|character| !character.is_control()).collect()
}

/// In the child, before QEMU: keeps only the descriptors meant for it, is confined, and dies with its parent.
fn prepare(parent: u32, inherited: &[RawFd], user: u32) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on integers; closing on exec what this process does not own is what is wanted.
    unsafe {
        check(libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32))?;
        for fd in inherited {
            check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
        }
        confinement::enter(user)?;
        // A change of identity takes the signal back, so it is asked for last.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() as u32 != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "child_tests.rs"]
mod tests;
