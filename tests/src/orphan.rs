//! Processes that outlive the one that started them, and that this process takes over, as conmon does.

use std::time::Instant;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::place::patience;
use crate::process::POLL;

/// Has processes whose parent ends become ours from now on.
pub fn become_subreaper() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("any process may be one");
}

/// A process that has become ours, or will when its parent ends.
#[derive(Debug)]
pub struct Orphan(Pid);

impl Orphan {
    /// The process of this id.
    pub fn of(pid: i32) -> Self {
        Self(Pid::from_raw(pid))
    }

    /// Its id.
    pub fn pid(&self) -> Pid {
        self.0
    }

    /// Sends it a signal.
    ///
    /// # Panics
    ///
    /// When it is gone.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(self.0, signal).expect("the process is still there");
    }

    /// Whether it still runs.
    ///
    /// # Panics
    ///
    /// When it is not ours.
    #[track_caller]
    pub fn running(&self) -> bool {
        rustix::process::waitid(
            rustix::process::WaitId::Pid(
                rustix::process::Pid::from_raw(self.0.as_raw()).expect("a process id"),
            ),
            rustix::process::WaitIdOptions::EXITED
                | rustix::process::WaitIdOptions::NOHANG
                | rustix::process::WaitIdOptions::NOWAIT,
        )
        .expect("the process is ours")
        .is_none()
    }

    /// Waits for its end and gives its exit code, or 128 and the signal that killed it.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`], or the process is not ours.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        let deadline = Instant::now() + patience();
        loop {
            match waitpid(self.0, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => return code,
                Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as i32,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => panic!("process {} cannot be waited for: {error}", self.0),
            }
            assert!(Instant::now() < deadline, "process {} did not end", self.0);
            std::thread::sleep(POLL);
        }
    }
}
