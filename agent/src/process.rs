//! A process that the agent started, and where it stands.
//!
//! ```text
//! SettingUp ──ready──► Created ──start──► Starting ──executed──► Running
//!     │                   │                   │                     │
//!     └── failure,        └───────────────────┴──────── end ────────┤
//!         then end                                                  ▼
//!                                            Ended ──alone──► Draining ──dry──► gone
//! ```
//!
//! `Ended` waits until nothing of the container is left (for its first process only); `Draining` until its
//! output has been handed to the streams. Then the end is reported.

use std::os::fd::OwnedFd;

use rustix::process::Pid;
use sandbox_protocol::{ExitStatus, Failure};

use crate::stdio::Connected;

/// The number of a process, never used twice.
pub type Serial = u64;

/// Where a process stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    /// It prepares itself; this request waits for it, and perhaps the one that starts it.
    SettingUp {
        /// The request to answer.
        request: u64,
        /// A `start` that came early.
        start: Option<u64>,
    },
    /// It waits for the word to execute.
    Created,
    /// It was told to execute; this request waits for it.
    Starting {
        /// The request to answer.
        request: u64,
    },
    /// It executes its program.
    Running,
    /// It has ended, but others of its container have not.
    Ended(ExitStatus),
    /// It has ended, and its output is on its way.
    Draining(ExitStatus),
}

/// Whether the process waits for a `start` request or executes as soon as it is ready.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// The first process of its container.
    Init,
    /// One more.
    Exec,
}

/// A process that the agent started.
#[derive(Debug)]
pub struct Process {
    /// Its container.
    pub container: String,
    /// Its id; empty for the container's first.
    pub id: String,
    /// What it is to its container.
    pub role: Role,
    /// Its pid as the agent sees it.
    pub pid: Pid,
    /// The same, proof against reuse.
    pub pidfd: OwnedFd,
    /// The line to it until it executes its program.
    pub channel: Option<OwnedFd>,
    /// Where it stands.
    pub stage: Stage,
    /// Its streams, until they are carried.
    pub stdio: Option<Connected>,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// The pumps to it.
    pub inputs: Vec<u64>,
    /// The pumps from it that have not ended.
    pub outputs: Vec<u64>,
    /// Why it could not be set up or executed.
    pub failure: Option<Failure>,
    /// The container's count of processes killed for lack of memory when this one started.
    pub oom_kills_before: u64,
}
