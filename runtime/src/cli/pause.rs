//! `sandbox pause` and `sandbox resume`.

use super::{Error, Global};
use crate::monitor;
use crate::sandbox::Request;
use crate::state::{SandboxId, Status, find};

/// The arguments of both.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
}

/// Holds every process of a sandbox.
pub fn pause(args: &Args, global: &Global) -> Result<u8, Error> {
    ask(args, global, Status::Running, &Request::Pause)
}

/// Lets the processes of a paused sandbox go on.
pub fn resume(args: &Args, global: &Global) -> Result<u8, Error> {
    ask(args, global, Status::Paused, &Request::Resume)
}

fn ask(args: &Args, global: &Global, wanted: Status, request: &Request) -> Result<u8, Error> {
    let (directory, record) = find(&global.root(), &args.id)?;
    if record.status != wanted {
        return Err(Error::Failed(format!(
            "container not {}: {} is {}",
            wanted.name(),
            args.id,
            record.status.name()
        )));
    }
    monitor::ask(&monitor::socket_of(&directory), request)?;
    Ok(0)
}
