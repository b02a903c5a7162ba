//! How a sandbox ends.

use std::io;
use std::time::Duration;

use sandbox_protocol::{ExitStatus, FailureKind};
use sandbox_vmm_api::ExitReason;
use serde::{Deserialize, Serialize};

use crate::agent::CallsError;
use crate::block::BlockError;
use crate::cgroup::CgroupError;
use crate::hooks::HookError;
use crate::listening::ListenError;
use crate::machine::MachineError;
use crate::network::NetworkError;
use crate::printable::printable;
use crate::share::ShareError;
use crate::state::{Refused, StateError};
use crate::stdio::ConsoleError;
use crate::view::ViewError;

/// How a sandbox ended, as its client learns it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The process ended, and all its output was delivered.
    Exited {
        /// How.
        status: ExitStatus,
        /// Whether the memory limit killed something.
        out_of_memory: bool,
    },
    /// Something else.
    Failed {
        /// The kind, for exit codes.
        failure: Failure,
        /// What happened, for people.
        message: String,
    },
}

/// The kinds of ending that exit codes tell apart.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// The program does not exist.
    CommandNotFound,
    /// The program cannot be executed.
    CommandNotExecutable,
    /// The process took longer than it was given.
    TimedOut,
    /// A signal came before the process ran.
    Cancelled {
        /// Its number.
        signal: u8,
    },
    /// A second interrupt cut the machine off.
    Interrupted,
    /// The process did not end of SIGKILL, and the machine was cut off.
    Killed,
    /// Anything else.
    Other,
}

/// Why a sandbox did not get to the end of its process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A state that does not lead where it was to go.
    #[error(transparent)]
    Status(#[from] Refused),
    /// The sockets for the guest.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The cgroup of the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The files of a container that joins.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The block devices of a container.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A hook on the host.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A hook could not be shown the container's files.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The terminal for the engine.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The machine's process.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A thread or descriptor of ours.
    #[error("cannot {step}: {error}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// The machine ended and said why.
    #[error("{}", describe(.reason, .before))]
    MachineEnded {
        /// Why.
        reason: ExitReason,
        /// What was still to come.
        before: &'static str,
    },
    /// KVM was asked for and could not be had.
    #[error("{0} (--machine qemu runs on any host, slower)")]
    NoKvm(String),
    /// The machine's process ended without a word.
    #[error("the virtual machine's process sandbox-vmm died: {0}")]
    MachineDied(String),
    /// The agent never spoke.
    #[error(
        "the agent in the guest did not answer within {} s{}", .limit.as_secs(),
        match .console { true => ": the console file shows what the guest printed", false => ": run again with --console FILE to see what the guest prints, or with --boot-timeout to wait longer" }
    )]
    NoAgent {
        /// How long it was waited for.
        limit: Duration,
        /// Whether there is a console file.
        console: bool,
    },
    /// The agent does not answer.
    #[error("the agent in the guest did not {step} within {} s", .limit.as_secs())]
    NoAnswer {
        /// What it was to do.
        step: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The agent's connection ended or broke the protocol.
    #[error("the connection to the agent in the guest is lost: {}", printable(.0))]
    AgentLost(String),
    /// A request could not be made of the agent, or its answers make no sense.
    #[error("the agent in the guest cannot be trusted any more: {0}")]
    Calls(#[from] CallsError),
    /// The guest did something that the protocol does not allow.
    #[error("the guest broke the protocol: {0}")]
    Protocol(&'static str),
    /// The agent could not do what it was asked.
    #[error("{}", printable(&.0.message))]
    Agent(sandbox_protocol::Failure),
    /// Our own standard output or error cannot be written.
    #[error("cannot write the process's {stream}: {error}")]
    Output {
        /// Which.
        stream: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The guest had output that it could not hand over.
    #[error("the process's {stream} is lost: {}", printable(.why))]
    Lost {
        /// Which.
        stream: &'static str,
        /// Why, as the guest says.
        why: String,
    },
    /// The output of a process that ended did not come to its end.
    #[error("the process has ended, but its output did not come to an end within {} s: some of it may be missing", .0.as_secs())]
    NoDrain(Duration),
    /// The process took longer than it was given.
    #[error("the process was stopped: it ran longer than its timeout of {0:?}")]
    TimedOut(Duration),
    /// The process ended before anybody wanted it to run.
    #[error("the container's process ended before it was started")]
    EndedEarly,
    /// A signal came before the process ran.
    #[error("stopped by signal {0} before the process started")]
    Cancelled(u8),
    /// The user has had enough.
    #[error("interrupted twice: the sandbox was cut off")]
    Interrupted,
    /// The process ignored what cannot be ignored.
    #[error("the process did not end when it was killed, and the sandbox was cut off")]
    Killed,
    /// The client has gone.
    #[error("the command that started the sandbox is gone")]
    ClientGone,
}

impl Ending {
    /// The ending that an error is.
    pub fn of(error: &Error) -> Self {
        let failure = match error {
            Error::Agent(failure) if failure.kind == FailureKind::CommandNotFound => Failure::CommandNotFound,
            Error::Agent(failure) if failure.kind == FailureKind::CommandNotExecutable => {
                Failure::CommandNotExecutable
            }
            Error::TimedOut(_) => Failure::TimedOut,
            Error::Cancelled(signal) => Failure::Cancelled { signal: *signal },
            Error::Interrupted => Failure::Interrupted,
            Error::Killed => Failure::Killed,
            _ => Failure::Other,
        };
        Self::Failed { failure, message: error.to_string() }
    }
}

fn describe(reason: &ExitReason, before: &str) -> String {
    match reason {
        ExitReason::PowerOff => format!("the guest powered itself off before {before}"),
        ExitReason::Reset => format!("the guest reset itself before {before}"),
        ExitReason::TripleFault => {
            "the guest's CPU gave up (triple fault): the guest kernel is broken or was broken".into()
        }
        ExitReason::Panic { console } => {
            let lines: String = console.iter().map(|line| format!("\n  {}", printable(line))).collect();
            format!("the guest kernel panicked; its last words:{lines}")
        }
        ExitReason::Stopped => "the virtual machine was stopped from outside".into(),
        ExitReason::Failed { message } => message.clone(),
    }
}
