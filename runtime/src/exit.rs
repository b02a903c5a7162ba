//! Exit codes, all of them.
//!
//! | code | of |
//! |---|---|
//! | the process's own, or 128 + the signal that killed it | `sandbox run` |
//! | 124 | `sandbox run`: the process ran longer than `--timeout` |
//! | 125 | `sandbox run`: the sandbox itself failed (as in other container tools) |
//! | 126 | `sandbox run`: the program cannot be executed |
//! | 127 | `sandbox run`: the program does not exist |
//! | 130 | `sandbox run`: a second interrupt cut the sandbox off |
//! | 137 | `sandbox run`: the process did not end of SIGKILL and was cut off |
//! | 255 | `sandbox exec`: the process could not be run (as runc says it) |
//! | 1 | any other command failed |
//! | 2 | any other command was not understood |

use std::os::unix::process::ExitStatusExt;

use crate::sandbox::{Ending, Failure};

/// The process was too slow, as timeout(1) says it.
pub const TIMED_OUT: u8 = 124;

/// The sandbox itself failed, as `docker run` says it.
pub const SANDBOX_FAILED: u8 = 125;

/// The program cannot be executed, as shells say it.
pub const NOT_EXECUTABLE: u8 = 126;

/// The program does not exist, as shells say it.
pub const NOT_FOUND: u8 = 127;

/// A process could not be added to a container, as runc says it: most processes never end with this.
pub const EXEC_FAILED: u8 = 255;

/// Any other command failed.
pub const FAILED: u8 = 1;

/// Any other command was not understood.
pub const MISUNDERSTOOD: u8 = 2;

/// It was killed, as shells say it.
pub const KILLED: u8 = SIGNAL + SIGKILL;

const SIGNAL: u8 = 128;
const SIGINT: u8 = 2;
const SIGKILL: u8 = 9;

/// The exit code of `sandbox run` for a sandbox that ended so.
pub fn code_of(ending: &Ending) -> u8 {
    match ending {
        Ending::Exited { status, .. } => status.shell_code(),
        Ending::Failed { failure, .. } => match failure {
            Failure::CommandNotFound => NOT_FOUND,
            Failure::CommandNotExecutable => NOT_EXECUTABLE,
            Failure::TimedOut => TIMED_OUT,
            Failure::Cancelled { signal } => SIGNAL.saturating_add(*signal),
            Failure::Interrupted => SIGNAL + SIGINT,
            Failure::Killed => KILLED,
            Failure::Other => SANDBOX_FAILED,
        },
    }
}

/// The exit code with which a process ends as another one did.
pub fn code_of_process(status: std::process::ExitStatus) -> u8 {
    let signal = status.signal().and_then(|signal| u8::try_from(signal).ok()).unwrap_or(0);
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(SIGNAL.saturating_add(signal))
}

#[cfg(test)]
mod tests {
    use sandbox_protocol::ExitStatus;

    use super::*;

    #[test]
    fn every_ending_has_the_code_of_the_table() {
        let failed = |failure| Ending::Failed { failure, message: String::new() };
        for (ending, code) in [
            (Ending::Exited { status: ExitStatus::Code(3), out_of_memory: false }, 3),
            (Ending::Exited { status: ExitStatus::Signal(15), out_of_memory: true }, 143),
            (failed(Failure::TimedOut), 124),
            (failed(Failure::Other), 125),
            (failed(Failure::CommandNotExecutable), 126),
            (failed(Failure::CommandNotFound), 127),
            (failed(Failure::Cancelled { signal: 2 }), 130),
            (failed(Failure::Interrupted), 130),
            (failed(Failure::Killed), 137),
        ] {
            assert_eq!(code_of(&ending), code, "{ending:?}");
        }
    }
}
