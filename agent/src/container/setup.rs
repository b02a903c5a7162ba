//! Everything that can go wrong while a child sets itself up, as the host is told.

use sandbox_protocol::{Failure, FailureKind};

use super::beneath::BeneathError;
use super::capabilities::CapabilityError;
use super::command::CommandError;
use super::devices::DeviceError;
use super::hidden::HiddenError;
use super::hooks::HookError;
use super::mounts::MountError;
use super::rights::RightsError;
use super::rlimits::RlimitError;
use super::rootfs::RootError;
use super::scheduling::SchedulingError;
use super::seccomp::SeccompFilterError;
use super::sysctl::SysctlError;
use super::terminal::TerminalError;
use super::user::UserError;
use crate::requests::failure;

/// Why a child could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The configuration has no process.
    #[error("config.json has no process")]
    NoProcess,
    /// The root.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A path in the root.
    #[error(transparent)]
    Beneath(#[from] BeneathError),
    /// A mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// `/dev`.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A masked or read-only path.
    #[error(transparent)]
    Hidden(#[from] HiddenError),
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The terminal.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    /// The user.
    #[error(transparent)]
    User(#[from] UserError),
    /// Capabilities.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// Resource limits.
    #[error(transparent)]
    Rlimit(#[from] RlimitError),
    /// How the kernel runs the process.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    /// What only the guest's root may do.
    #[error(transparent)]
    Rights(#[from] RightsError),
    /// The system call filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompFilterError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A step of another kind.
    #[error("cannot {step}: {source}")]
    Step {
        /// What was being done.
        step: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl SetupError {
    /// A step of another kind failed.
    pub fn step<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        Self::step_of(move || step.into())
    }

    /// The same, told of what: in words that are made only where it fails.
    pub fn step_of<E: Into<std::io::Error>>(step: impl FnOnce() -> String) -> impl FnOnce(E) -> Self {
        move |e| Self::Step { step: step(), source: e.into() }
    }

    /// What the host is told.
    pub fn failure(&self) -> Failure {
        let kind = match self {
            Self::User(_) => FailureKind::UnknownUser,
            Self::Command(command) => command.kind(),
            _ => FailureKind::Other,
        };
        failure(kind, self)
    }
}
