//! What only the guest's root may do for a process: done by the agent from outside for one that is born into a user
//! namespace, and by any other for itself, before it enters one.

use oci_spec::runtime::Process;
use rustix::process::Pid;

use super::rlimits::{self, RlimitError};
use super::scheduling::{self, SchedulingError};

/// A right could not be given.
#[derive(Debug, thiserror::Error)]
pub enum RightsError {
    /// How willingly the kernel kills it.
    #[error("cannot set process.oomScoreAdj to {score}: {source}")]
    OomScore {
        /// The score.
        score: i32,
        /// Why not.
        source: std::io::Error,
    },
    /// How far its limits may reach.
    #[error(transparent)]
    Rlimit(#[from] RlimitError),
    /// How the kernel runs it.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
}

/// Gives a child that has just been cloned, or this process, what it could not take later.
pub fn give(child: Option<Pid>, process: &Process) -> Result<(), RightsError> {
    if let Some(score) = process.oom_score_adj() {
        let of = child.map_or("self".to_owned(), |child| child.as_raw_nonzero().to_string());
        std::fs::write(format!("/proc/{of}/oom_score_adj"), score.to_string())
            .map_err(|source| RightsError::OomScore { score, source })?;
    }
    rlimits::make_room(child, process.rlimits().as_deref().unwrap_or_default())?;
    Ok(scheduling::apply(child, process)?)
}
