//! Bind mounts of the host's cgroups, which engines make for systemd and users by old habit.
//!
//! The host's cgroups are not those that the container is in, and whoever may write to them may have a program run
//! on the host (`release_agent`): they are never shared. What is meant are the container's own, and those it gets, in
//! the guest: from a mount of type `cgroup` that is there already, which becomes writable if the bind mount was, or
//! from one in the bind mount's place. A cgroup namespace comes with it, without which a program would look for its
//! cgroup at a path that the mount does not have.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Spec};

use super::share::is_read_only;
use super::validate::is_bind;

/// Where every system has its cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The numbers that `statfs` gives for both versions.
const MAGIC: [i64; 2] = [0x0027_e0eb, 0x6367_7270];

/// Replaces them; sources are relative to the bundle.
pub fn replace(spec: &mut Spec, bundle: &Path) {
    let mounts = spec.mounts().clone().unwrap_or_default();
    let (of_host, mut kept): (Vec<_>, Vec<_>) =
        mounts.into_iter().partition(|mount| is_bind(mount) && is_of_host(mount, bundle));
    if of_host.is_empty() {
        return;
    }
    for mount in &of_host {
        take_over(mount, &mut kept);
    }
    spec.set_mounts(Some(kept));
    let linux = spec.linux_mut().get_or_insert_default();
    let namespaces = linux.namespaces_mut().get_or_insert_default();
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup) {
        let mut own = LinuxNamespace::default();
        own.set_typ(LinuxNamespaceType::Cgroup).set_path(None);
        namespaces.push(own);
    }
}

fn is_of_host(mount: &Mount, bundle: &Path) -> bool {
    let Some(source) = mount.source() else { return false };
    // What does not exist has an error of its own later.
    let Ok(real) = bundle.join(source).canonicalize() else { return false };
    real.starts_with(CGROUPS) || rustix::fs::statfs(&real).is_ok_and(|found| MAGIC.contains(&found.f_type))
}

fn take_over(bind: &Mount, kept: &mut Vec<Mount>) {
    let read_only = is_read_only(bind);
    let above = kept.iter_mut().find(|mount| {
        matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"))
            && bind.destination().starts_with(mount.destination())
    });
    match above {
        Some(_) if read_only => {}
        Some(mount) => {
            let options = mount.options().iter().flatten().filter(|option| *option != "ro").cloned();
            mount.set_options(Some(options.collect()));
        }
        None => {
            let access = if read_only { "ro" } else { "rw" };
            let options = ["nosuid", "nodev", "noexec", access].map(str::to_owned).to_vec();
            let mut own = Mount::default();
            own.set_destination(bind.destination().clone())
                .set_typ(Some("cgroup".into()))
                .set_source(Some("cgroup".into()))
                .set_options(Some(options));
            kept.push(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn replaced(mounts: Value) -> Value {
        let spec = json!({"ociVersion": "1.2.0", "mounts": mounts, "linux": {"namespaces": []}});
        let mut spec = serde_json::from_value(spec).unwrap();
        replace(&mut spec, Path::new("/"));
        json!([spec.mounts(), spec.linux().as_ref().unwrap().namespaces()])
    }

    fn bind(destination: &str, options: &[&str]) -> Value {
        json!({"destination": destination, "type": "bind", "source": "/sys/fs/cgroup", "options": options})
    }

    fn cgroup(destination: &str, options: &[&str]) -> Value {
        json!({"destination": destination, "type": "cgroup", "source": "cgroup", "options": options})
    }

    #[test]
    fn a_mount_of_the_container_s_own_becomes_writable_where_the_host_s_was() {
        let own = |options: &[&str]| json!([[cgroup("/sys/fs/cgroup", options)], [{"type": "cgroup"}]]);
        let with = |options: &[&str]| {
            replaced(json!([
                cgroup("/sys/fs/cgroup", &["nodev", "ro"]),
                bind("/sys/fs/cgroup/systemd", options)
            ]))
        };
        assert_eq!(with(&["bind"]), own(&["nodev"]));
        assert_eq!(with(&["bind", "ro"]), own(&["nodev", "ro"]));
    }

    #[test]
    fn elsewhere_one_is_made_in_its_place() {
        let options = ["nosuid", "nodev", "noexec", "ro"];
        let expected = json!([[cgroup("/cgroups", &options)], [{"type": "cgroup"}]]);
        assert_eq!(replaced(json!([bind("/cgroups", &["rbind", "ro"])])), expected);
    }

    #[test]
    fn other_mounts_stay() {
        let mounts = json!([
            {"destination": "/etc", "type": "bind", "source": "/etc", "options": ["bind"]},
            cgroup("/sys/fs/cgroup", &["ro"]),
        ]);
        assert_eq!(replaced(mounts.clone()), json!([mounts, []]));
    }
}
