//! `sandbox spec`.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use super::{Error, Global};
use crate::spec::template;

const NO_ROOTLESS: &str = "--rootless: a virtual machine is made by root, and a configuration for other users is not \
                           written: leave it out, and give the container users of its own with linux.uidMappings";

// The arguments of `sandbox spec`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The bundle to write it into
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
}

/// Writes a config.json to start from. One that is there is left alone.
pub fn spec(args: &Args, global: &Global) -> Result<u8, Error> {
    if global.rootless.as_deref() == Some("true") {
        return Err(Error::Usage(NO_ROOTLESS.into()));
    }
    let path = args.bundle.join("config.json");
    let error = |error| Error::Write { path: path.clone(), error };
    let text = serde_json::to_string_pretty(&template()).map_err(|e| error(e.into()))?;
    let mut file = File::create_new(&path).map_err(error)?;
    writeln!(file, "{text}").map_err(error)?;
    Ok(0)
}
