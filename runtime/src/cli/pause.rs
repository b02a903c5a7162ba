//! `sandbox pause` and `sandbox resume`.

use super::{Error, Global};
use crate::lifecycle;
use crate::state::SandboxId;

// The arguments of both.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
}

/// Holds every process of a sandbox.
pub fn pause(args: &Args, global: &Global) -> Result<u8, Error> {
    lifecycle::pause(&args.id, &global.root()?)?;
    Ok(0)
}

/// Lets the processes of a paused sandbox go on.
pub fn resume(args: &Args, global: &Global) -> Result<u8, Error> {
    lifecycle::resume(&args.id, &global.root()?)?;
    Ok(0)
}
