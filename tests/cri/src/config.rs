//! What the tests say of a pod and of a container, and what the interface calls that.

use std::collections::HashMap;

use k8s_cri::v1::*;
use serde::Deserialize;

/// A pod.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pod {
    pub name: String,
    /// How often there has been one of this name.
    pub attempt: u32,
    /// The runtime class's handler.
    pub handler: String,
    /// The directory of its containers' logs.
    pub logs: String,
    /// The cgroup that it is put in.
    pub cgroup: String,
    pub annotations: HashMap<String, String>,
    /// The limit of memory of all its containers, in bytes; 0: none.
    pub memory: i64,
    /// Whether it has the host's network.
    pub host_network: bool,
}

/// A container.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Container {
    pub name: String,
    pub attempt: u32,
    pub image: String,
    pub command: Vec<String>,
    pub stdin: bool,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whose processes it sees.
    pub pid: Pid,
    /// In bytes; 0: none.
    pub memory: i64,
    pub read_only: bool,
    pub user: Option<i64>,
    pub groups: Vec<i64>,
    pub mounts: Vec<Volume>,
    pub devices: Vec<Node>,
}

/// Whose processes a container sees.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pid {
    /// Its own.
    #[default]
    Container,
    /// Those of all in the pod that say so.
    Pod,
    /// Those of the container of this id.
    Target(String),
}

/// The limits of a container that are to change.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// In bytes; 0: as it is.
    pub memory: i64,
    /// Microseconds of CPU time in each period; 0: as it is.
    pub cpu_quota: i64,
    pub cpu_period: i64,
}

/// A directory or file of the host in a container.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    pub host: String,
    pub container: String,
    #[serde(default)]
    pub read_only: bool,
}

/// A device of the host in a container.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    pub host: String,
    pub container: String,
    pub permissions: String,
}

impl From<Pod> for PodSandboxConfig {
    fn from(pod: Pod) -> Self {
        let network = if pod.host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
        let namespaces = NamespaceOption {
            network: network.into(),
            pid: NamespaceMode::Container.into(),
            ipc: NamespaceMode::Pod.into(),
            ..Default::default()
        };
        Self {
            metadata: Some(PodSandboxMetadata {
                uid: pod.name.clone(),
                name: pod.name.clone(),
                namespace: "tests".into(),
                attempt: pod.attempt,
            }),
            hostname: if pod.host_network { String::new() } else { pod.name },
            log_directory: pod.logs,
            annotations: pod.annotations,
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: pod.cgroup,
                resources: Some(LinuxContainerResources {
                    memory_limit_in_bytes: pod.memory,
                    ..Default::default()
                }),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

impl From<Container> for ContainerConfig {
    fn from(container: Container) -> Self {
        let security = LinuxContainerSecurityContext {
            readonly_rootfs: container.read_only,
            run_as_user: container.user.map(|value| Int64Value { value }),
            supplemental_groups: container.groups,
            namespace_options: Some(container.pid.into()),
            ..Default::default()
        };
        let resources =
            LinuxContainerResources { memory_limit_in_bytes: container.memory, ..Default::default() };
        Self {
            log_path: format!("{}.{}.log", container.name, container.attempt),
            metadata: Some(ContainerMetadata { name: container.name, attempt: container.attempt }),
            image: Some(ImageSpec { image: container.image, ..Default::default() }),
            command: container.command,
            stdin: container.stdin,
            tty: container.tty,
            mounts: container.mounts.into_iter().map(Into::into).collect(),
            devices: container.devices.into_iter().map(Into::into).collect(),
            linux: Some(LinuxContainerConfig {
                resources: Some(resources),
                security_context: Some(security),
            }),
            ..Default::default()
        }
    }
}

impl From<Pid> for NamespaceOption {
    fn from(pid: Pid) -> Self {
        let (mode, target_id) = match pid {
            Pid::Container => (NamespaceMode::Container, String::new()),
            Pid::Pod => (NamespaceMode::Pod, String::new()),
            Pid::Target(id) => (NamespaceMode::Target, id),
        };
        Self { pid: mode.into(), target_id, ..Default::default() }
    }
}

impl From<Limits> for LinuxContainerResources {
    fn from(limits: Limits) -> Self {
        Self {
            memory_limit_in_bytes: limits.memory,
            cpu_quota: limits.cpu_quota,
            cpu_period: limits.cpu_period,
            ..Default::default()
        }
    }
}

impl From<Volume> for Mount {
    fn from(volume: Volume) -> Self {
        Self {
            container_path: volume.container,
            host_path: volume.host,
            readonly: volume.read_only,
            ..Default::default()
        }
    }
}

impl From<Node> for Device {
    fn from(node: Node) -> Self {
        Self { container_path: node.container, host_path: node.host, permissions: node.permissions }
    }
}
