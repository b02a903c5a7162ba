//! What only the guest's root may do for a process, done by the agent from outside, where the process may be root
//! of no more than its own user namespace.

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

/// Gives a child that has just been cloned what it could not take itself.
pub fn give(child: Pid, process: &Process) -> Result<(), RightsError> {
    if let Some(score) = process.oom_score_adj() {
        std::fs::write(format!("/proc/{}/oom_score_adj", child.as_raw_nonzero()), score.to_string())
            .map_err(|source| RightsError::OomScore { score, source })?;
    }
    rlimits::make_room(child, process.rlimits().as_deref().unwrap_or_default())?;
    Ok(scheduling::apply(child, process)?)
}
