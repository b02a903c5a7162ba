//! `sandbox start`.

use std::path::Path;

use super::{Error, Global};
use crate::monitor;
use crate::sandbox::Request;
use crate::state::{SandboxId, Status, find};

/// The arguments of `sandbox start`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
}

/// Executes the process of a created sandbox.
pub fn start(args: &Args, global: &Global) -> Result<u8, Error> {
    by_id(&args.id, &global.root())
}

/// Executes the process of a created sandbox.
pub fn by_id(id: &SandboxId, root: &Path) -> Result<u8, Error> {
    let (directory, record) = find(root, id)?;
    match record.status {
        Status::Created => {}
        Status::Stopped => return Err(Error::Failed("cannot start a container that has stopped".into())),
        Status::Running => return Err(Error::Failed("cannot start an already running container".into())),
        status => return Err(Error::Failed(format!("cannot start a container that is {}", status.name()))),
    }
    monitor::ask(&monitor::socket_of(&directory), &Request::Start)?;
    Ok(0)
}
