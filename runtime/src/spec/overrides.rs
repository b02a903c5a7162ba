//! What the command line changes in a configuration.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Mount, Process, Spec};

use super::{SpecError, is_bind};
use crate::quantity::{Cpus, Size};

/// The changes. An empty one changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Replaces `process.args`, unless empty.
    pub args: Vec<String>,
    /// `NAME=VALUE`: set in `process.env`; `NAME` alone: with the value it has here, if it has one.
    pub env: Vec<String>,
    /// Replaces `process.cwd`.
    pub cwd: Option<PathBuf>,
    /// Replaces `process.user`, looked up in the container's own files.
    pub user: Option<String>,
    /// Replaces `hostname`.
    pub hostname: Option<String>,
    /// Replaces `linux.resources.memory.limit`.
    pub memory: Option<Size>,
    /// Replaces `linux.resources.cpu.quota` and `period`.
    pub cpus: Option<Cpus>,
    /// Bind mounts, each where `mounts` has none at its place; one of another kind gives way to it.
    pub binds: Vec<Mount>,
}

impl Overrides {
    /// Changes a configuration.
    pub fn apply(&self, spec: &mut Spec) -> Result<(), SpecError> {
        if let Some(process) = spec.process_mut() {
            self.apply_to_process(process)?;
        }
        if let Some(hostname) = &self.hostname {
            spec.set_hostname(Some(hostname.clone()));
        }
        for bind in &self.binds {
            let mounts = spec.mounts_mut().get_or_insert_with(Vec::new);
            let is_there = |mount: &Mount| mount.destination() == bind.destination();
            if !mounts.iter().any(|mount| is_there(mount) && is_bind(mount)) {
                mounts.retain(|mount| !is_there(mount));
                mounts.push(bind.clone());
            }
        }
        if self.memory.is_some() || self.cpus.is_some() {
            let linux = spec.linux_mut().get_or_insert_with(empty_linux);
            self.apply_to_resources(linux.resources_mut().get_or_insert_with(LinuxResources::default));
        }
        Ok(())
    }

    /// Changes a process.
    pub fn apply_to_process(&self, process: &mut Process) -> Result<(), SpecError> {
        if !self.args.is_empty() {
            process.set_args(Some(self.args.clone()));
        }
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        let env = process.env_mut().get_or_insert_with(Vec::new);
        for variable in &self.env {
            set_variable(env, variable)?;
        }
        Ok(())
    }

    fn apply_to_resources(&self, resources: &mut LinuxResources) {
        const PERIOD_MICROS: u64 = 100_000;
        if let Some(Size(limit)) = self.memory {
            let memory = resources.memory_mut().get_or_insert_with(LinuxMemory::default);
            memory.set_limit(i64::try_from(limit).ok());
            // They were chosen for the limit that is replaced, and may not fit the new one.
            memory.set_swap(None);
            memory.set_reservation(None);
        }
        if let Some(cpus) = self.cpus {
            let cpu = resources.cpu_mut().get_or_insert_with(LinuxCpu::default);
            cpu.set_quota(Some(i64::from(cpus.milli) * (PERIOD_MICROS as i64 / 1000)));
            cpu.set_period(Some(PERIOD_MICROS));
            cpu.set_burst(None);
        }
    }
}

/// Sets a variable, in its place where it is there already.
fn set_variable(env: &mut Vec<String>, variable: &str) -> Result<(), SpecError> {
    let name = variable.split('=').next().unwrap_or_default();
    if name.is_empty() {
        let why = format!("`{variable}` has no name: write --env NAME=VALUE");
        return Err(SpecError::Value { path: "process.env".into(), why });
    }
    let entry = match (variable.contains('='), std::env::var(name)) {
        (true, _) => variable.to_owned(),
        (false, Ok(value)) => format!("{name}={value}"),
        (false, Err(_)) => return Ok(()),
    };
    let prefix = format!("{name}=");
    env.retain(|old| !old.starts_with(&prefix));
    env.push(entry);
    Ok(())
}

/// The type's own default is a whole container's worth of namespaces and paths.
fn empty_linux() -> oci_spec::runtime::Linux {
    let mut linux = oci_spec::runtime::Linux::default();
    linux
        .set_namespaces(None)
        .set_devices(None)
        .set_resources(None)
        .set_masked_paths(None)
        .set_readonly_paths(None)
        .set_rootfs_propagation(None)
        .set_seccomp(None)
        .set_sysctl(None)
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    linux
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn changed(overrides: Overrides) -> serde_json::Value {
        let spec = json!({"ociVersion": "1.2.0",
            "process": {"cwd": "/", "args": ["sh"], "env": ["PATH=/bin", "A=1", "AB=2"], "user": {"uid": 0, "gid": 0}}});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        overrides.apply(&mut spec).unwrap();
        serde_json::to_value(spec).unwrap()
    }

    #[test]
    fn nothing_changes_nothing() {
        let spec = changed(Overrides::default());
        assert_eq!(spec["process"]["args"], json!(["sh"]));
        assert_eq!(spec.get("linux"), None);
    }

    #[test]
    fn variables_replace_their_like_only() {
        let spec = changed(Overrides { env: vec!["A=x=y".into(), "N=".into()], ..Default::default() });
        assert_eq!(spec["process"]["env"], json!(["PATH=/bin", "AB=2", "A=x=y", "N="]));
    }

    #[test]
    fn a_variable_without_a_name_is_refused() {
        let mut spec = Spec::default();
        let nameless = Overrides { env: vec!["=x".into()], ..Default::default() };
        assert!(matches!(nameless.apply(&mut spec), Err(SpecError::Value { .. })));
    }

    #[test]
    fn limits_bring_nothing_else_along() {
        let spec = changed(Overrides {
            memory: Some(Size(64 << 20)),
            cpus: Some(Cpus { milli: 1500 }),
            ..Default::default()
        });
        let resources = json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 150000, "period": 100000}});
        assert_eq!(spec["linux"], json!({ "resources": resources }));
    }

    #[test]
    fn binds_go_where_there_are_none() {
        let mounts = json!([{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/mine", "options": ["rbind"]}]);
        let mut spec: Spec =
            serde_json::from_value(json!({"ociVersion": "1.2.0", "mounts": mounts})).unwrap();
        let bind = |place: &str| {
            let bind =
                json!({"destination": place, "type": "bind", "source": "/theirs", "options": ["rbind"]});
            serde_json::from_value(bind).unwrap()
        };
        let binds = ["/dev/shm", "/etc/hosts", "/etc/hostname"].map(bind).to_vec();
        Overrides { binds, ..Default::default() }.apply(&mut spec).unwrap();
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_deref());
        let sources: Vec<_> = sources.map(|source| source.to_str().unwrap()).collect();
        assert_eq!(sources, ["/mine", "/theirs", "/theirs"]);
    }

    #[test]
    fn command_user_and_place_are_replaced() {
        let spec = changed(Overrides {
            args: vec!["id".into(), "-u".into()],
            cwd: Some("/tmp".into()),
            hostname: Some("box".into()),
            ..Default::default()
        });
        assert_eq!(spec["process"]["args"], json!(["id", "-u"]));
        assert_eq!(spec["process"]["cwd"], json!("/tmp"));
        assert_eq!(spec["hostname"], json!("box"));
    }
}
