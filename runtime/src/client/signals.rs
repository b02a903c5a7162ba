//! The signals that a client passes on.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};

/// The signals that reach the process in the guest.
pub const FORWARDED: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
];

/// Signals as something to read.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals of interest and collects them instead. Children started from now on have them
    /// blocked as well.
    pub fn block() -> std::io::Result<Self> {
        let ignored = ignored();
        let mut read = SigSet::empty();
        let wanted =
            FORWARDED.into_iter().filter(|s| *s != Signal::SIGHUP || !ignored.contains(Signal::SIGHUP));
        for signal in wanted.chain([Signal::SIGWINCH]) {
            read.add(signal);
        }
        let mut blocked = read;
        // Setting a terminal from the background would stop us otherwise.
        blocked.add(Signal::SIGTTOU);
        blocked.thread_block()?;
        Ok(Self(SignalFd::with_flags(&read, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// Waits for a signal, or for something else to be readable or closed; whether it is the latter.
    pub fn wait_beside(&self, other: &impl AsFd) -> bool {
        let sources = [self.as_fd(), other.as_fd()];
        let mut ready = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
        let _ = rustix::event::poll(&mut ready, None);
        let [_, other] = ready;
        !other.revents().is_empty()
    }

    /// The next signal that has come.
    pub fn take(&mut self) -> Option<Signal> {
        let info = self.0.read_signal().ok()??;
        i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The signals that are ignored: nohup(1) ignores SIGHUP, and means it.
fn ignored() -> SigSet {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let bits = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    Signal::iterator().filter(|signal| bits & (1 << (*signal as i32 - 1)) != 0).collect()
}
