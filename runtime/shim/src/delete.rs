//! `delete`: containerd has lost the shim of a container, and wants nothing to be left of it.
//!
//! containerd gives up after 5 s and kills what it has started, which a host that has little time for us may need. So
//! another process removes things, and comes to its end whatever becomes of the one that containerd waits for.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::protobuf::{self, Message};
use containerd_shim_protos::{Client, TaskClient, ttrpc};
use sandbox_runtime::descriptor::{self, Ties};
use sandbox_runtime::lifecycle;
use sandbox_runtime::log::Log;
use sandbox_runtime::state::{InvalidId, SandboxId};

use crate::container::ROOTFS;
use crate::events::timestamp;
use crate::flags::Flags;
use crate::mounts::{self, MountError};
use crate::place::{self, PlaceError};

const POLL: Duration = Duration::from_millis(2);

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
    /// The process that is to remove things cannot be started.
    #[error("cannot start the process that removes what is left: {0}")]
    Start(io::Error),
    /// It has said why.
    #[error("something may be left ({0})")]
    Left(ExitStatus),
    /// The answer.
    #[error("cannot write the answer: {0}")]
    Answer(#[from] protobuf::Error),
}

/// Whether the bundle, the working directory, is that of the container still. containerd also asks after a shim that has
/// ended as it was told to: the bundle has been removed then, and another container may have the name by now.
fn is_current() -> bool {
    std::env::current_dir().is_ok()
}

/// How long a shim may take to end.
const END_TIME: Duration = Duration::from_secs(10);

/// Ends the shim of this socket, if it is there: containerd was killed before it knew of it, and will not ask it for
/// anything any more. What it is doing is cut off.
fn end_shim(socket: &Path) {
    let Ok(client) = Client::connect(&format!("unix://{}", socket.display())) else { return };
    let request = ShutdownRequest { now: true, ..ShutdownRequest::default() };
    let context = ttrpc::context::with_duration(END_TIME);
    // Its end may be faster than its answer.
    let _ = TaskClient::new(client).shutdown(context, &request);
    let deadline = Instant::now() + END_TIME;
    while UnixStream::connect(socket).is_ok() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
}

/// Has what is left of a container removed. Returns what containerd is answered.
pub fn delete(flags: &Flags) -> Result<Vec<u8>, DeleteError> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["-namespace", &flags.namespace, "-id", &flags.id]);
    if let Some(bundle) = &flags.bundle {
        command.arg("-bundle").arg(bundle);
    }
    if flags.debug {
        command.arg("-debug");
    }
    command.arg("remove").stdin(Stdio::null());
    descriptor::give(&mut command, &[], Ties::None).map_err(DeleteError::Start)?;
    let done = command.output().map_err(DeleteError::Start)?;
    // For containerd's log.
    let _ = io::stderr().write_all(&done.stderr);
    match done.status.success() {
        true => Ok(done.stdout),
        false => Err(DeleteError::Left(done.status)),
    }
}

/// Removes what is left of a container. Returns what containerd is answered.
pub fn remove(flags: &Flags) -> Result<Vec<u8>, DeleteError> {
    let id: SandboxId = flags.id.parse()?;
    let bundle = flags.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let root = match place::root_of(&bundle) {
        Some(root) => root,
        None => place::of(&flags.namespace, flags.debug)?.root,
    };
    if is_current() {
        end_shim(&place::socket(&root, &flags.id));
    }
    if is_current() {
        for line in lifecycle::delete_by_force(&id, &root)? {
            Log::plain().info(&line);
        }
        mounts::unmount(&bundle.join(ROOTFS))?;
    }
    if root.exists() {
        let _lock = place::lock(&root)?;
        if is_current() {
            let _ = std::fs::remove_file(place::socket(&root, &flags.id));
        }
        place::sweep(&root);
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
