//! `delete`: containerd has lost the shim of a container, and wants nothing to be left of it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{self, Message};
use sandbox_runtime::lifecycle;
use sandbox_runtime::log::Log;
use sandbox_runtime::state::{InvalidId, SandboxId};

use crate::container::ROOTFS;
use crate::events::timestamp;
use crate::flags::Flags;
use crate::mounts::{self, MountError};
use crate::place::{self, PlaceError};

/// The exit code that a container has then: it was killed.
const KILLED: u32 = 128 + 9;

/// Why something may be left.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The name is none.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The environment.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The sandbox.
    #[error(transparent)]
    Lifecycle(#[from] lifecycle::Error),
    /// The root file system.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The answer.
    #[error("cannot write the answer: {0}")]
    Answer(#[from] protobuf::Error),
}

/// Removes what is left of a container. Returns what containerd is answered.
pub fn delete(flags: &Flags) -> Result<Vec<u8>, DeleteError> {
    let id: SandboxId = flags.id.parse()?;
    let bundle = flags.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let root = match place::root_of(&bundle) {
        Some(root) => root,
        None => place::of(&flags.namespace, flags.debug)?.root,
    };
    for line in lifecycle::delete_by_force(&id, &root)? {
        Log::plain().info(&line);
    }
    mounts::unmount(&bundle.join(ROOTFS))?;
    if root.exists() {
        let _lock = place::lock(&root)?;
        let socket = place::socket(&root, &flags.id);
        if UnixStream::connect(&socket).is_err() {
            let _ = std::fs::remove_file(&socket);
        }
        // The last one out; it is not empty otherwise.
        let _ = std::fs::remove_dir(&root);
    }
    let answer = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..DeleteResponse::default()
    };
    Ok(answer.write_to_bytes()?)
}
