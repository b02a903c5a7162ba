//! What other processes ask of a sandbox: its client over the lifeline, other commands over its socket.

use oci_spec::runtime::{LinuxResources, Process};
use sandbox_protocol::ExitStatus;
use sandbox_vmm_api::ShareEntry;
use serde::{Deserialize, Serialize};

use super::plan::ContainerPlan;

/// A request.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Execute the created container's process.
    Start,
    /// Send a signal to the process.
    Signal {
        /// Its number on x86-64 Linux.
        signal: i32,
        /// Whether every process of the container gets it.
        #[serde(default)]
        all: bool,
    },
    /// The user pressed the interrupt key, or sent SIGINT: a signal the first time, the end of the sandbox the
    /// second time.
    Interrupt,
    /// Set the size of the process's terminal.
    Resize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Run one more process in the container. Its standard streams travel with the request; the connection stays
    /// open until the process has ended, and takes [`Request::Signal`] and [`Request::Resize`] for it.
    Exec {
        /// The process.
        process: Box<Process>,
    },
    /// Make one more container in the machine, as planned. Its standard streams travel with the request; the
    /// connection stays open until the container has ended, and takes [`Request::Signal`] and [`Request::Resize`]
    /// for it. Its end is the container's.
    Join {
        /// The container.
        container: Box<ContainerPlan>,
        /// What the machine is to share besides.
        shares: Vec<ShareEntry>,
    },
    /// Hold every process of the container.
    Pause,
    /// Let them go on.
    Resume,
    /// List the container's processes.
    Processes,
    /// What the container has used.
    Stats,
    /// Change the container's limits.
    Update {
        /// The limits that change.
        resources: Box<LinuxResources>,
    },
    /// Tell of kills for lack of memory in the container, as they happen, until it ends: [`Answer::OutOfMemory`] each
    /// time. Whoever asked for this before is told no more.
    WatchMemory,
}

/// The answer to a request.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// What was asked for.
    Data {
        /// As JSON.
        value: serde_json::Value,
    },
    /// Not done.
    Refused {
        /// Why.
        message: String,
    },
    /// The kernel of the guest has killed a process of the container for lack of memory, or several.
    OutOfMemory,
    /// The process of [`Request::Exec`], or the container of [`Request::Join`], has ended, and all its output was
    /// delivered.
    Exited {
        /// How.
        status: ExitStatus,
    },
}

impl Answer {
    /// A refusal.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::Refused { message: message.into() }
    }
}
