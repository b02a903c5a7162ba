//! `sandbox state`.

use serde_json::json;

use super::{Error, Global, print};
use crate::state::{SandboxId, find};

// The arguments of `sandbox state`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
}

/// Prints the state of a sandbox, with the fields of the OCI specification and those that runc adds.
pub fn state(args: &Args, global: &Global) -> Result<u8, Error> {
    let (_, record) = find(&global.root()?, &args.id)?;
    let mut state = record.oci_state(record.status);
    state["rootfs"] = json!(record.rootfs);
    state["created"] = json!(record.created);
    state["owner"] = json!("");
    print(&format!("{state:#}\n"))?;
    Ok(0)
}
