//! Errors, and the codes that containerd tells them apart by.

use containerd_shim_protos::ttrpc::{self, Code};
use sandbox_runtime::lifecycle;
use sandbox_runtime::monitor::AskError;
use sandbox_runtime::state::StateError;

use crate::mounts::MountError;
use crate::options::OptionsError;
use crate::place::PlaceError;
use crate::pod::PodError;
use crate::stdio::StdioError;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container or process.
    #[error("{0} does not exist")]
    NotFound(String),
    /// There is one already.
    #[error("{0} exists")]
    Exists(String),
    /// A process that has ended cannot be told anything.
    #[error("process already finished")]
    Finished,
    /// It is not in a state for it.
    #[error("{0}")]
    State(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// It cannot be done at all.
    #[error("{0}")]
    Never(&'static str),
    /// The options of a container.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The pod.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The environment.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The root file system.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The sandbox.
    #[error(transparent)]
    Lifecycle(#[from] lifecycle::Error),
    /// Something on our side.
    #[error("cannot {step}: {error}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        error: std::io::Error,
    },
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) | Self::Options(_) | Self::Pod(_) => Code::INVALID_ARGUMENT,
            Self::Never(_) => Code::UNIMPLEMENTED,
            Self::Lifecycle(error) => match error {
                lifecycle::Error::State(StateError::NotFound { .. }) => Code::NOT_FOUND,
                lifecycle::Error::State(StateError::InUse { .. }) => Code::ALREADY_EXISTS,
                lifecycle::Error::Spec(_) | lifecycle::Error::Usage(_) => Code::INVALID_ARGUMENT,
                lifecycle::Error::Failed(_) => Code::FAILED_PRECONDITION,
                _ => Code::UNKNOWN,
            },
            Self::Place(_) | Self::Mount(_) | Self::Stdio(_) | Self::Host { .. } => Code::UNKNOWN,
        }
    }

    /// Whether the sandbox that was to be asked is not there any more.
    pub fn is_gone(&self) -> bool {
        use lifecycle::Error::{Ask, State, Stopped};
        matches!(
            self,
            Self::Lifecycle(Stopped | State(StateError::NotFound { .. }) | Ask(AskError::Connection { .. }))
        )
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
