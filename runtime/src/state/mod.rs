//! What is known of a sandbox on the host: its id, its status, its directory.

mod directory;
mod id;
mod record;
mod registry;
mod status;

use std::io;
use std::path::{Path, PathBuf};

pub use directory::{NAMESPACE_MARK, StateDir, StateDirPaths};
pub use directory::{is_owned, owner};
pub use id::{InvalidId, MAX_ID_CHARS, SandboxId};
pub use record::{OCI_VERSION, Record, rfc3339};
pub use registry::{default_root, directories, find, list, read_record, remove_dead, remove_if_dead, sweep};
pub use status::{Refused, Status, Transition};

/// Why the state of a sandbox could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another sandbox has the id.
    #[error(
        "container with id exists: `{id}` is in use by another sandbox: choose another id, or remove that one with `sandbox delete --force {id}`"
    )]
    InUse {
        /// The id.
        id: SandboxId,
    },
    /// No sandbox has the id.
    #[error("container does not exist: no sandbox has the id `{id}`; `sandbox list` shows those there are")]
    NotFound {
        /// The id.
        id: SandboxId,
    },
    /// There is something else in the place of the directory.
    #[error("{} is in the way, and not of a sandbox's making: use another --id or --root", path.display())]
    Foreign {
        /// What is in the way.
        path: PathBuf,
    },
    /// A directory cannot be made.
    #[error("cannot make the state directory {}: {error}{}", path.display(), remedy(error))]
    Make {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A directory cannot be locked.
    #[error("cannot lock the state directory {}: {error}", path.display())]
    Lock {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The record cannot be written.
    #[error("cannot write the state file {}: {error}{}", path.display(), remedy(error))]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A record cannot be read.
    #[error("cannot read the state file {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A record makes no sense.
    #[error(
        "the state file {} is damaged: {error}: `sandbox delete --force {}` removes the sandbox all the same",
        path.display(), name_of(path)
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
    /// A directory cannot be removed.
    #[error("cannot remove the state directory {}: {error}", path.display())]
    Remove {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// The name of the sandbox whose record this is.
fn name_of(record: &Path) -> std::borrow::Cow<'_, str> {
    record.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy()
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": make room there, or move the state with --root"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ": run as root, or move the state with --root"
        }
        _ => "",
    }
}
