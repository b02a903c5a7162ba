//! The bundle of a pod's first container, for containerd's sandbox API, which names none.
//!
//! A sandbox is a pod's first container and those that join it (see `docs/adr/`), so that the sandbox API needs a container
//! to begin with. It runs this program, shared into the guest, which does there what Kubernetes' `pause` does:
//! [`crate::pause`]. Its files are its bundle's; those that all containers of the pod have are beside them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};
use serde_json::{Value, json};

use crate::container::ROOTFS;
use crate::pause;
use crate::pod::{Dns, PodConfig};

/// The user of the first container, who is nobody.
const NOBODY: u32 = 65_535;

/// Where its program is, for itself.
const PROGRAM: &str = "/pause";

/// Annotations of the pod that mean something to a sandbox.
const OURS: &str = "dev.sandbox.";

/// What the containers of a pod find in `/etc`.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Where POSIX shared memory is, here as there.
const SHARED_MEMORY: &str = "/dev/shm";

/// Writes the bundle of the pod with this id.
pub fn write(bundle: &Path, id: &str, network: &str, pod: &PodConfig) -> io::Result<()> {
    let program = std::env::current_exe()?;
    fs::DirBuilder::new().recursive(true).create(bundle.join(ROOTFS))?;
    fs::write(bundle.join("config.json"), config(id, network, pod, &program).to_string())?;
    fs::write(bundle.join("hostname"), format!("{}\n", pod.hostname))?;
    fs::copy("/etc/hosts", bundle.join("hosts"))?;
    match resolver(&pod.dns) {
        Some(text) => fs::write(bundle.join("resolv.conf"), text),
        None => fs::copy("/etc/resolv.conf", bundle.join("resolv.conf")).map(drop),
    }
}

/// What its containers get besides what their configurations have: containerd leaves these to who makes the sandbox.
pub fn mounts(bundle: &Path) -> Vec<Mount> {
    let bind = |destination: &str, source: PathBuf| {
        let options = ["rbind", "rprivate", "rw"].map(str::to_owned).to_vec();
        MountBuilder::default()
            .destination(destination)
            .typ("bind")
            .source(source)
            .options(options)
            .build()
            .ok()
    };
    let files = FILES.iter().map(|name| bind(&format!("/etc/{name}"), bundle.join(name)));
    // That of the guest, as for every pod; it is known by its place and its kind.
    let memory = [bind(SHARED_MEMORY, SHARED_MEMORY.into()).filter(|_| is_in_memory(SHARED_MEMORY))];
    files.chain(memory).flatten().collect()
}

fn is_in_memory(path: &str) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
}

fn config(id: &str, network: &str, pod: &PodConfig, program: &Path) -> Value {
    let own = [("pid", pod.node_pid), ("ipc", pod.node_ipc), ("uts", false), ("mount", false)];
    let own = own.into_iter().filter(|(_, nodes)| !nodes).map(|(kind, _)| json!({"type": kind}));
    let network = json!({"type": "network", "path": network});
    let namespaces: Vec<Value> = own.chain([network]).collect();
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": NOBODY, "gid": NOBODY},
            "cwd": "/",
            "args": [PROGRAM, pause::SUBCOMMAND],
            "noNewPrivileges": true,
        },
        "root": {"path": ROOTFS, "readonly": true},
        "hostname": pod.hostname,
        "mounts": [{"destination": PROGRAM, "type": "bind", "source": program, "options": ["bind", "ro"]}],
        "annotations": annotations(id, pod),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroup(id, &pod.cgroup_parent),
            "sysctl": pod.sysctls,
        },
    })
}

/// Those that containerd gives a pod's first container itself where it makes one.
fn annotations(id: &str, pod: &PodConfig) -> Value {
    let mut all = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": id,
        "io.kubernetes.cri.sandbox-name": pod.name,
        "io.kubernetes.cri.sandbox-namespace": pod.namespace,
        "io.kubernetes.cri.sandbox-uid": pod.uid,
        "io.kubernetes.cri.sandbox-log-directory": pod.log_directory,
        "io.kubernetes.cri.sandbox-cpu-period": pod.limits.cpu_period.to_string(),
        "io.kubernetes.cri.sandbox-cpu-quota": pod.limits.cpu_quota.to_string(),
        "io.kubernetes.cri.sandbox-cpu-shares": pod.limits.cpu_shares.to_string(),
        "io.kubernetes.cri.sandbox-memory": pod.limits.memory_bytes.to_string(),
    });
    for (key, value) in pod.annotations.iter().filter(|(key, _)| key.starts_with(OURS)) {
        all[key] = value.as_str().into();
    }
    all
}

/// The cgroup of a container in that of the pod, named as containerd names it.
fn cgroup(id: &str, parent: &str) -> String {
    match parent.rsplit('/').next().filter(|name| name.ends_with(".slice")) {
        Some(slice) => format!("{slice}:cri-containerd:{id}"),
        None => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// The text of `resolv.conf`. `None`: the host's.
fn resolver(dns: &Dns) -> Option<String> {
    if *dns == Dns::default() {
        return None;
    }
    let list = |word: &str, all: &[String]| match all {
        [] => String::new(),
        all => format!("{word} {}\n", all.join(" ")),
    };
    let servers: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    Some(list("search", &dns.searches) + &servers + &list("options", &dns.options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_first_container_is_what_the_pod_is() {
        let pod = PodConfig {
            hostname: "web".into(),
            annotations: [("dev.sandbox.vcpus", "2"), ("io.kubernetes.cri.sandbox-id", "other"), ("x", "y")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            node_ipc: true,
            ..PodConfig::default()
        };
        let config = config("id", "/run/netns/n", &pod, Path::new("/usr/bin/shim"));
        let kinds = config["linux"]["namespaces"].as_array().unwrap();
        let expected = [
            json!({"type": "pid"}),
            json!({"type": "uts"}),
            json!({"type": "mount"}),
            json!({"type": "network", "path": "/run/netns/n"}),
        ];
        assert_eq!(kinds[..], expected);
        let annotations = config["annotations"].as_object().unwrap();
        assert_eq!(annotations["dev.sandbox.vcpus"], "2");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-id"], "id");
        assert_eq!(annotations.get("x"), None);
    }

    #[test]
    fn cgroups_are_named_as_containerd_names_them() {
        assert_eq!(cgroup("id", "/kubepods/pod1"), "/kubepods/pod1/id");
        assert_eq!(cgroup("id", ""), "/id");
        assert_eq!(cgroup("id", "/kubepods.slice/pod1.slice"), "pod1.slice:cri-containerd:id");
    }

    #[test]
    fn names_are_looked_up_where_the_pod_wants() {
        let dns = Dns {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a".into(), "b".into()],
            options: vec![],
        };
        assert_eq!(resolver(&dns).unwrap(), "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n");
        assert_eq!(resolver(&Dns::default()), None);
    }
}
