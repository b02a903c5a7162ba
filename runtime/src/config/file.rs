//! One file of the configuration: its sections and keys.

use std::path::Path;

use sandbox_vmm_api::MachineChoice;
use serde::Deserialize;

use super::value::{AbsolutePath, Allowed, MachineMemory, Overhead, Timeout, Vcpus};
use super::{Config, ConfigError};

/// A file as it is written. What it leaves out stays as it was.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    machine: MachineSection,
    state: StateSection,
    annotations: AnnotationsSection,
    metrics: MetricsSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MachineSection {
    kind: Option<MachineChoice>,
    kernel: Option<AbsolutePath>,
    image: Option<AbsolutePath>,
    vmm: Option<AbsolutePath>,
    boot_timeout: Option<Timeout>,
    memory: Option<MachineMemory>,
    pod_memory: Option<MachineMemory>,
    memory_overhead: Option<Overhead>,
    vcpus: Option<Vcpus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StateSection {
    root: Option<AbsolutePath>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct AnnotationsSection {
    allowed: Option<Vec<Allowed>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct MetricsSection {
    directory: Option<AbsolutePath>,
}

impl File {
    /// Reads one. Errors have its path, and the place in it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or(text);
            ConfigError::Wrong {
                path: path.into(),
                line: before.matches('\n').count() + 1,
                column: before.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
                why: error.message().replace('\n', ", "),
            }
        })
    }

    /// Changes what it has.
    pub fn apply(self, config: &mut Config) {
        let Self { machine, state, annotations, metrics } = self;
        let to = &mut config.machine;
        set(&mut to.sizes.memory_mib, machine.memory.map(|size| size.0));
        set(&mut to.sizes.pod_memory_mib, machine.pod_memory.map(|size| size.0));
        set(&mut to.sizes.overhead_mib, machine.memory_overhead.map(|size| size.0));
        set(&mut to.sizes.vcpus, machine.vcpus.map(|vcpus| vcpus.0));
        set(&mut to.choice, machine.kind);
        set(&mut to.kernel, machine.kernel.map(|path| Some(path.0)));
        set(&mut to.image, machine.image.map(|path| Some(path.0)));
        set(&mut to.vmm, machine.vmm.map(|path| Some(path.0)));
        set(&mut to.boot_timeout, machine.boot_timeout.map(|timeout| timeout.0));
        set(&mut config.root, state.root.map(|path| Some(path.0)));
        set(&mut config.metrics, metrics.directory.map(|path| Some(path.0)));
        let allowed = annotations.allowed.map(|all| all.into_iter().map(|one| one.0).collect());
        set(&mut config.annotations, allowed);
    }
}

fn set<T>(to: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *to = value;
    }
}
