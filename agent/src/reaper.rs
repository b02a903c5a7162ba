//! Processes that ended.
//!
//! PID 1 inherits every orphan, so all children are waited for, known or not.

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, wait};
use sandbox_protocol::ExitStatus;

/// Reaps every child that has ended.
pub fn reap() -> Vec<(Pid, ExitStatus)> {
    let mut ended = Vec::new();
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                if let Some(status) = exit_status(status.exit_status(), status.terminating_signal()) {
                    ended.push((pid, status));
                }
            }
            Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return ended,
        }
    }
}

/// An exit code or a signal; neither means that the child only stopped or went on.
fn exit_status(code: Option<i32>, signal: Option<i32>) -> Option<ExitStatus> {
    match (code, signal) {
        (Some(code), _) => Some(ExitStatus::Code(code as u8)),
        (None, Some(signal)) => Some(ExitStatus::Signal(signal as u8)),
        (None, None) => None,
    }
}
