//! What this program does in the guest, as the first process of a pod: nothing, until it is told to end. Orphans of a pod
//! whose containers share its process ids are its children.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// The name of the hidden subcommand.
pub const SUBCOMMAND: &str = "pause";

/// Returns the exit code.
pub fn main() -> u8 {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD].into_iter().collect();
    if signals.thread_block().is_err() {
        return 1;
    }
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                while waitpid(None, Some(WaitPidFlag::WNOHANG))
                    .is_ok_and(|found| found != WaitStatus::StillAlive)
                {}
            }
            Ok(_) => return 0,
            Err(_) => return 1,
        }
    }
}
