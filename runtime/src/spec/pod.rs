//! What a configuration says of the pod that its container belongs to, in the annotations of containerd and CRI-O.
//!
//! A pod is a sandbox whose first container holds it together (Kubernetes calls its program `pause`); the others join
//! it. They share its network, names and System V and POSIX objects, and on request process ids: an engine says so with
//! the path of a namespace of the process that stands for one of the pod's containers. That process is of the
//! host and in none of them; what its path means here is the guest's namespace of that container.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use sandbox_protocol::Joined;

use super::SpecError;
use crate::state::SandboxId;

/// The annotations that say what a container is to its pod: of containerd, and of CRI-O.
const KIND: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// Those that name the first container of the pod.
const SANDBOX: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// What the sandbox of a pod may be sized by.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// The namespaces that the containers of a pod may share.
const SHARED: [LinuxNamespaceType; 4] =
    [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts, LinuxNamespaceType::Pid];

/// What a container is to a pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// It belongs to none.
    Alone,
    /// It is the first of one.
    Sandbox,
    /// It joins the pod of this first container.
    Member(SandboxId),
}

/// What the containers of a pod may use together.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PodLimits {
    /// Memory, in bytes.
    pub memory_bytes: Option<i64>,
    /// CPU time in a period, in microseconds.
    pub cpu_quota: Option<i64>,
    /// The period, in microseconds.
    pub cpu_period: Option<u64>,
    /// Their share of the CPUs, where 1024 is one.
    pub cpu_shares: Option<u64>,
}

impl Role {
    /// That of a configuration's container.
    pub fn of(spec: &Spec) -> Result<Self, SpecError> {
        let Some((key, kind)) = find(spec, &KIND) else { return Ok(Self::Alone) };
        match kind {
            "sandbox" => Ok(Self::Sandbox),
            "container" => {
                let (key, id) = find(spec, &SANDBOX).ok_or_else(|| {
                    error(key, format!("it joins a pod that `{}` does not name", SANDBOX[0]))
                })?;
                id.parse().map(Self::Member).map_err(|why| error(key, format!("{why}")))
            }
            other => Err(error(key, format!("`{other}` is neither `sandbox` nor `container`"))),
        }
    }
}

impl PodLimits {
    /// Those of a pod, in the configuration of its first container.
    pub fn of(spec: &Spec) -> Result<Self, SpecError> {
        Ok(Self {
            memory_bytes: number(spec, MEMORY)?,
            cpu_quota: number(spec, CPU_QUOTA)?,
            cpu_period: number(spec, CPU_PERIOD)?,
            cpu_shares: number(spec, CPU_SHARES)?,
        })
    }
}

/// Takes the paths of namespaces out of a configuration; what they mean is for the agent. `whose` knows a container of
/// the pod by the path of a namespace.
pub fn take_joined(
    spec: &mut Spec,
    whose: impl Fn(LinuxNamespaceType, &Path) -> Option<SandboxId>,
) -> Result<Vec<Joined>, SpecError> {
    let mut joined = Vec::new();
    let Some(linux) = spec.linux_mut() else { return Ok(joined) };
    let Some(namespaces) = linux.namespaces_mut() else { return Ok(joined) };
    for (index, namespace) in namespaces.iter_mut().enumerate() {
        let Some(path) = namespace.path().clone().filter(|path| !path.as_os_str().is_empty()) else {
            namespace.set_path(None);
            continue;
        };
        let kind = namespace.typ();
        let container = Some(kind).filter(|kind| SHARED.contains(kind)).and_then(|kind| whose(kind, &path));
        let container = container.ok_or_else(|| SpecError::Unsupported {
            path: format!("linux.namespaces[{index}].path"),
            reason: format!(
                "{} is not a namespace of the pod's that its containers may share (network, ipc, uts and pid, by the \
                 process of a container of the pod)",
                path.display()
            ),
        })?;
        joined.push(Joined { kind, container: container.to_string() });
    }
    namespaces.retain(|namespace| namespace.path().is_none());
    Ok(joined)
}

/// Looks whether a pod asks for the host's network, as engines write it: by leaving the namespace out.
pub fn check_network(spec: &Spec, role: &Role) -> Result<(), SpecError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let mut kinds = namespaces.into_iter().flatten().map(|namespace| namespace.typ());
    if *role == Role::Alone || kinds.any(|kind| kind == LinuxNamespaceType::Network) {
        return Ok(());
    }
    Err(SpecError::Unsupported {
        path: "linux.namespaces".into(),
        reason: "the pod has no network namespace, which asks for the host's network (hostNetwork: true): a virtual \
                 machine cannot have that; give the pod a network of its own, or another runtime class"
            .into(),
    })
}

/// The path of a namespace in a configuration.
pub fn namespace_path(spec: &Spec, kind: LinuxNamespaceType) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)?.path().clone()
}

/// The process whose namespace a path such as `/proc/12/ns/ipc` is.
pub fn process_of_namespace(kind: LinuxNamespaceType, path: &Path) -> Option<u32> {
    let file = match kind {
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Pid => "pid",
        _ => return None,
    };
    let (pid, name) = path.to_str()?.strip_prefix("/proc/")?.split_once("/ns/")?;
    (name == file).then(|| pid.parse().ok())?
}

fn find<'a>(spec: &'a Spec, keys: &[&'static str]) -> Option<(&'static str, &'a str)> {
    let annotations = spec.annotations().as_ref()?;
    keys.iter().find_map(|key| Some((*key, annotations.get(*key)?.as_str())))
}

fn number<T: std::str::FromStr>(spec: &Spec, key: &'static str) -> Result<Option<T>, SpecError> {
    let Some((_, text)) = find(spec, &[key]) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| error(key, format!("`{text}` is not a number")))
}

fn error(key: &str, why: String) -> SpecError {
    SpecError::Value { path: format!("annotations.{key}"), why }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(annotations: Value, namespaces: Value) -> Spec {
        let spec =
            json!({"ociVersion": "1.2.0", "annotations": annotations, "linux": {"namespaces": namespaces}});
        serde_json::from_value(spec).unwrap()
    }

    fn role(annotations: Value) -> Result<Role, String> {
        Role::of(&spec(annotations, json!([]))).map_err(|e| e.to_string())
    }

    #[test]
    fn both_engines_annotations_are_understood() {
        assert_eq!(role(json!({})), Ok(Role::Alone));
        for (kind, sandbox) in [(KIND[0], SANDBOX[0]), (KIND[1], SANDBOX[1])] {
            assert_eq!(role(json!({kind: "sandbox", sandbox: "pod"})), Ok(Role::Sandbox));
            let member = Role::Member("pod".parse().unwrap());
            assert_eq!(role(json!({kind: "container", sandbox: "pod"})), Ok(member));
            assert!(role(json!({kind: "container"})).unwrap_err().contains(kind));
            assert!(role(json!({kind: "container", sandbox: "../x"})).unwrap_err().contains(sandbox));
            assert!(role(json!({kind: "pod"})).unwrap_err().contains("neither `sandbox` nor `container`"));
        }
    }

    #[test]
    fn namespaces_of_the_pod_are_joined_and_others_refused() {
        let whose = |kind, path: &Path| match process_of_namespace(kind, path) {
            Some(7) => Some("pod".parse().unwrap()),
            _ => None,
        };
        let mut good = spec(
            json!({}),
            json!([{"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "mount"}, {"type": "pid", "path": ""}]),
        );
        let joined = Joined { kind: LinuxNamespaceType::Ipc, container: "pod".into() };
        assert_eq!(take_joined(&mut good, whose).unwrap(), [joined]);
        let left = good.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        assert!(left.len() == 2 && left.iter().all(|namespace| namespace.path().is_none()));
        for bad in [
            json!({"type": "ipc", "path": "/proc/8/ns/ipc"}),
            json!({"type": "ipc", "path": "/proc/7/ns/net"}),
            json!({"type": "mount", "path": "/proc/7/ns/mnt"}),
            json!({"type": "uts", "path": "/proc/7/ns/uts/../uts"}),
            json!({"type": "pid", "path": "/var/run/pid"}),
        ] {
            let message = take_joined(&mut spec(json!({}), json!([bad])), whose).unwrap_err().to_string();
            assert!(message.contains("linux.namespaces[0].path"), "{message}");
        }
    }

    #[test]
    fn a_pod_has_a_network_of_its_own() {
        let with = |namespaces| spec(json!({}), namespaces);
        let own = with(json!([{"type": "network", "path": "/run/netns/a"}]));
        let none = with(json!([{"type": "ipc"}]));
        assert!(check_network(&none, &Role::Alone).is_ok());
        assert!(check_network(&own, &Role::Sandbox).is_ok());
        let error = check_network(&none, &Role::Sandbox).unwrap_err().to_string();
        assert!(error.contains("hostNetwork"), "{error}");
    }

    #[test]
    fn limits_are_numbers() {
        let limits = PodLimits::of(&spec(json!({MEMORY: "1048576", CPU_SHARES: "512"}), json!([]))).unwrap();
        let expected =
            PodLimits { memory_bytes: Some(1 << 20), cpu_shares: Some(512), ..PodLimits::default() };
        assert_eq!(limits, expected);
        assert!(PodLimits::of(&spec(json!({CPU_QUOTA: "much"}), json!([]))).is_err());
    }
}
