//! The bundle and its `config.json`: read with a bound, held against the table of fields, checked, and turned
//! into what the guest gets.
//!
//! Three forms, each made from the one before: the text of the file; a [`Bundle`], whose specification is valid
//! as far as this host can tell; a [`GuestSpec`], in which every host path has become the path at which the
//! guest finds it, next to the list of what the machine has to share for it.

mod annotations;
mod block;
mod capabilities;
mod cgroup_mounts;
pub mod fields;
mod id_maps;
mod load;
mod memory_volume;
mod overrides;
mod pod;
mod rates;
mod share;
mod size;
mod template;
mod validate;
mod walk;

use std::io;
use std::path::PathBuf;

pub use annotations::{ANNOTATIONS, Asked};
pub use block::{HostBlock, of as blocks_of};
pub use load::{
    Bundle, MAX_CONFIG_BYTES, process_from, process_from_json, process_of, resources_of, spec_of,
};
pub use overrides::Overrides;
pub use pod::{Role, check_network, namespace_path, process_of_namespace, take_joined};
pub use rates::rates_of;
pub use share::GuestSpec;
pub use size::{MachineSize, MachineSizes};
pub use template::template;
pub use validate::{check_process, is_bind};

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The bundle cannot be entered.
    #[error("the bundle {} cannot be read: {error}", path.display())]
    Bundle {
        /// The bundle.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The bundle is something else.
    #[error("the bundle {} is not a directory", path.display())]
    BundleNotDirectory {
        /// The bundle.
        path: PathBuf,
    },
    /// There is no configuration.
    #[error("the bundle {} has no config.json: write one with `sandbox spec --bundle {}`", path.display(), path.display())]
    NoConfig {
        /// The bundle.
        path: PathBuf,
    },
    /// The configuration cannot be read.
    #[error("{} cannot be read: {error}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The configuration is larger than any.
    #[error("{} is larger than {max} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        max: u64,
    },
    /// The configuration is no JSON. The message has line and column.
    #[error("{} is not valid JSON: {error}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        error: serde_json::Error,
    },
    /// The configuration follows another version.
    #[error("config.json: ociVersion: `{version}` is not supported: this runtime takes versions 1.x")]
    Version {
        /// What it says.
        version: String,
    },
    /// A field that no version of the specification has.
    #[error("config.json: `{path}`: unknown field{}", similar.map(|s| format!(": did you mean `{s}`?")).unwrap_or_else(|| ": remove it".into()))]
    UnknownField {
        /// Its JSON path.
        path: String,
        /// What may have been meant.
        similar: Option<&'static str>,
    },
    /// A field that is not honoured.
    #[error("config.json: `{path}`: not supported: {reason}; remove it")]
    Unsupported {
        /// Its JSON path.
        path: String,
        /// Why.
        reason: String,
    },
    /// A value that is wrong.
    #[error("config.json: `{path}`: {why}")]
    Value {
        /// Its JSON path.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// The root file system cannot be used.
    #[error("config.json: `root.path`: {} {why}", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The source of a bind mount cannot be used.
    #[error("config.json: `mounts[{index}].source`: {} {why}", path.display())]
    MountSource {
        /// Which mount.
        index: usize,
        /// The source.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A process cannot live in so little memory.
    #[error(
        "a memory limit of {bytes} bytes is too small to run anything in: give at least {min_mib} MiB (--memory {min_mib}M, or linux.resources.memory.limit)"
    )]
    MemoryTooSmall {
        /// The limit.
        bytes: u64,
        /// The least.
        min_mib: u64,
    },
    /// No machine has so much memory.
    #[error("a memory limit of {bytes} bytes is too large: a machine has at most {max_mib} MiB")]
    MemoryTooLarge {
        /// The limit.
        bytes: u64,
        /// The most.
        max_mib: u32,
    },
    /// No machine has so many CPUs.
    #[error("{cpus} CPUs are too many: a machine has at most {max}")]
    TooManyCpus {
        /// How many.
        cpus: u64,
        /// The most.
        max: u8,
    },
}
