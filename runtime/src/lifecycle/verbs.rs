//! What is asked of a sandbox that is there, and the making of one.

use std::path::{Path, PathBuf};
use std::process::Child;

use oci_spec::runtime::LinuxResources;
use sandbox_protocol::{Processes, Stats};
use sandbox_vmm_api::MachineKind;
use serde::de::DeserializeOwned;

use super::Error;
use crate::client::{self, Created};
use crate::sandbox::{Answer, Ending, Ends, Plan, Request};
use crate::state::{Record, SandboxId, Status, find};
use crate::{monitor, process};

/// Makes a sandbox, whose process waits to be started. Returns what stands for it, a child of this process.
///
/// Its process has these streams; none: those of this process.
pub fn create(
    plan: &Plan,
    streams: Option<Ends>,
    on_machine: &mut dyn FnMut(MachineKind, &str),
) -> Result<Child, Error> {
    match client::create(plan, streams, on_machine)? {
        Created::Stands { stand_in } => Ok(stand_in),
        Created::Failed(Ending::Failed { message, .. }) => Err(Error::Failed(message)),
        Created::Failed(Ending::Exited { .. }) => {
            Err(Error::Failed("the process ended before its start".into()))
        }
    }
}

/// Executes the process of a created sandbox. Returns what is to be said besides: hooks that failed.
pub fn start(id: &SandboxId, root: &Path) -> Result<Vec<String>, Error> {
    let (directory, record) = find(root, id)?;
    match record.status {
        Status::Created => {}
        Status::Stopped => return Err(Error::Failed("cannot start a container that has stopped".into())),
        Status::Running => return Err(Error::Failed("cannot start an already running container".into())),
        status => return Err(Error::Failed(format!("cannot start a container that is {}", status.name()))),
    }
    match monitor::ask(&monitor::socket_of(&directory), &Request::Start)? {
        Answer::Data { value } => Ok(serde_json::from_value(value).unwrap_or_default()),
        _ => Ok(Vec::new()),
    }
}

/// Sends a signal to the process, or to all that there are.
pub fn signal(id: &SandboxId, root: &Path, signal: i32, all: bool) -> Result<(), Error> {
    let socket = socket_of_living(id, root)?;
    monitor::ask(&socket, &Request::Signal { signal, all })?;
    Ok(())
}

/// Sets the size of the process's terminal.
pub fn resize(id: &SandboxId, root: &Path, width: u16, height: u16) -> Result<(), Error> {
    monitor::ask(&socket_of_living(id, root)?, &Request::Resize { width, height })?;
    Ok(())
}

/// Holds every process.
pub fn pause(id: &SandboxId, root: &Path) -> Result<(), Error> {
    change(id, root, Status::Running, &Request::Pause)
}

/// Lets the processes of a paused sandbox go on.
pub fn resume(id: &SandboxId, root: &Path) -> Result<(), Error> {
    change(id, root, Status::Paused, &Request::Resume)
}

fn change(id: &SandboxId, root: &Path, wanted: Status, request: &Request) -> Result<(), Error> {
    let (directory, record) = find(root, id)?;
    if record.status != wanted {
        let (wanted, is) = (wanted.name(), record.status.name());
        return Err(Error::Failed(format!("container not {wanted}: {id} is {is}")));
    }
    monitor::ask(&monitor::socket_of(&directory), request)?;
    Ok(())
}

/// The processes that there are, with the ids that they have in the guest.
pub fn processes(id: &SandboxId, root: &Path) -> Result<Processes, Error> {
    data_of(monitor::ask(&socket_of_living(id, root)?, &Request::Processes)?)
}

/// The processes that the sandbox consists of on the host, what stands for it first.
pub fn host_processes(id: &SandboxId, root: &Path) -> Result<Vec<u32>, Error> {
    Ok(process::family(living(id, root)?.1.pid))
}

/// What it uses.
pub fn stats(id: &SandboxId, root: &Path) -> Result<Stats, Error> {
    data_of(monitor::ask(&socket_of_living(id, root)?, &Request::Stats)?)
}

/// Changes its limits.
pub fn update(id: &SandboxId, root: &Path, resources: LinuxResources) -> Result<(), Error> {
    let socket = socket_of_living(id, root)?;
    monitor::ask(&socket, &Request::Update { resources: Box::new(resources) })?;
    Ok(())
}

/// The request socket of a sandbox that has not stopped.
pub fn socket_of_living(id: &SandboxId, root: &Path) -> Result<PathBuf, Error> {
    Ok(monitor::socket_of(&living(id, root)?.0))
}

/// The directory and the record of a sandbox that has not stopped.
fn living(id: &SandboxId, root: &Path) -> Result<(PathBuf, Record), Error> {
    let found = find(root, id)?;
    match found.1.status {
        Status::Stopped => Err(Error::Stopped),
        _ => Ok(found),
    }
}

fn data_of<T: DeserializeOwned>(answer: Answer) -> Result<T, Error> {
    match answer {
        Answer::Data { value } => serde_json::from_value(value).map_err(|_| Error::NoSense),
        _ => Err(Error::NoSense),
    }
}
