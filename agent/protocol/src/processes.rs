//! The processes of a container, as `ps` shows them.

use serde::{Deserialize, Serialize};

/// The processes of a container.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Processes {
    /// By ascending pid.
    pub processes: Vec<ProcessInfo>,
    /// Whether there are more than a frame holds.
    pub truncated: bool,
}

/// A process of a container. What it says of itself is cut to a bounded length and made valid text; it may
/// hold control characters and is not to be trusted.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct ProcessInfo {
    /// Its pid in the guest's initial pid namespace.
    pub pid: u32,
    /// Its parent's, likewise; 1 is the agent.
    pub ppid: u32,
    /// Its effective user.
    pub uid: u32,
    /// Its state as one letter, as in proc_pid_stat(5): `R`, `S`, `D`, `Z`, `T` and others.
    pub state: char,
    /// When it started, in seconds since the epoch by the guest's clock.
    pub start_seconds: u64,
    /// The CPU time that it has used, user and system, in milliseconds.
    pub cpu_millis: u64,
    /// Its controlling terminal: `pts/N`, or `MAJOR:MINOR` of one of another kind.
    pub tty: Option<String>,
    /// Its arguments with a space between them, or its name in brackets where it has none.
    pub command: String,
}
