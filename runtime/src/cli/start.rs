//! `sandbox start`.

use super::{Error, Global};
use crate::lifecycle;
use crate::log::Log;
use crate::state::SandboxId;

// The arguments of `sandbox start`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
}

/// Executes the process of a created sandbox.
pub fn start(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    lifecycle::start(&args.id, &global.root()?)?.iter().for_each(|failed| log.warn(failed));
    Ok(0)
}
