//! What can be done with a sandbox, whoever wants it: the command line, or the shim of an engine.
//!
//! A sandbox is known by its id and the state root that it lives under. Making one starts the processes that own
//! it ([`crate::stand_in`], [`crate::monitor`]); everything else asks them, and what they leave is removed here.

mod delete;
mod plan;
mod pod;
mod verbs;

pub use delete::{delete, delete_by_force};
pub use plan::{Console, MachineWanted, Place, Wanted, plan};
pub use verbs::{
    create, host_processes, pause, processes, resize, resume, signal, socket_of_living, start, stats, update,
};

use crate::artefact::ArtefactError;
use crate::cgroup::CgroupError;
use crate::client::{ClientError, ExecError};
use crate::monitor::AskError;
use crate::spec::SpecError;
use crate::state::StateError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The state of the sandbox.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something that has to be installed.
    #[error(transparent)]
    Artefact(#[from] ArtefactError),
    /// The processes that own a sandbox.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The sandbox refused, or could not be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A process that was to be added.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The cgroup of the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It has stopped.
    #[error("container not running: it has stopped")]
    Stopped,
    /// The sandbox is not in a state for it, or failed.
    #[error("{0}")]
    Failed(String),
    /// It was asked for in a way that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// An answer could not be read.
    #[error("the sandbox gave an answer that makes no sense: it may be of another release")]
    NoSense,
}
