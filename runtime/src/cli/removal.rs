//! `sandbox delete`.

use super::{Error, Global};
use crate::lifecycle;
use crate::log::Log;
use crate::state::SandboxId;

// The arguments of `sandbox delete`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// Kill it first if it runs; one that does not exist is no error
    #[arg(long, short)]
    force: bool,
}

/// Removes what is left of a sandbox.
pub fn delete(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    let root = global.root()?;
    let said = match args.force {
        false => lifecycle::delete(&args.id, &root)?,
        true => lifecycle::delete_by_force(&args.id, &root)?,
    };
    for line in said {
        log.info(&line);
    }
    Ok(0)
}
