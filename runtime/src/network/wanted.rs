//! What network a configuration asks for.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use super::{Growth, Network, NetworkError, namespace};
use crate::state::SandboxId;

/// The network that a sandbox is to have.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// The loopback interface of the virtual machine: that the configuration says nothing means the sandbox's own.
    #[default]
    Loopback,
    /// That of a new network namespace, in which what stands for the container lives, so that an engine can fill it.
    New,
    /// That of the network namespace at this path.
    Namespace(PathBuf),
}

impl Wanted {
    /// What a configuration asks for.
    pub fn of(spec: &Spec) -> Self {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
        let network = namespaces.unwrap_or_default().iter().find(|n| n.typ() == LinuxNamespaceType::Network);
        match (network, network.and_then(path)) {
            (None, _) => Self::Loopback,
            (Some(_), None) => Self::New,
            (Some(_), Some(path)) => Self::Namespace(path.clone()),
        }
    }

    /// Makes the host's side of it. `id` is what that is recognised by, `stand_in` the process that stands for the
    /// container; without one, nobody can fill a new namespace.
    pub fn prepare(
        &self,
        id: &SandboxId,
        stand_in: Option<u32>,
        growth: Growth,
    ) -> Result<Option<Network>, NetworkError> {
        self.path(stand_in).map(|path| Network::prepare(&path, id.as_str(), growth)).transpose()
    }

    /// Where the namespace on the host is, if there is one.
    pub fn path(&self, stand_in: Option<u32>) -> Option<Cow<'_, Path>> {
        match (self, stand_in) {
            (Self::Loopback, _) | (Self::New, None) => None,
            (Self::New, Some(pid)) => Some(PathBuf::from(format!("/proc/{pid}/ns/net")).into()),
            (Self::Namespace(path), _) => Some(path.into()),
        }
    }

    /// Moves this process, which has one thread and stands for the container, to where engines look for its network.
    /// Returns the namespace that it was in, if that was another.
    pub fn enter(&self) -> io::Result<Option<OwnedFd>> {
        let home = File::open(namespace::OWN)?;
        match self {
            Self::Loopback => return Ok(None),
            Self::New => unshare(CloneFlags::CLONE_NEWNET)?,
            Self::Namespace(path) => setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?,
        }
        Ok(Some(home.into()))
    }

    /// Removes what a sandbox that was killed has left of it.
    pub fn clean_up(&self, id: &SandboxId) -> Result<(), NetworkError> {
        match self {
            // A new namespace has gone with the last process in it.
            Self::Loopback | Self::New => Ok(()),
            Self::Namespace(path) => super::clean_up(path, id.as_str()),
        }
    }

    /// Puts a container of the guest into the sandbox's network, which is that of the virtual machine.
    pub fn in_guest(spec: &mut Spec) {
        let namespaces = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut());
        if let Some(namespaces) = namespaces {
            namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
        }
    }
}

/// The path of a namespace. An empty one is none, as everywhere in a configuration.
fn path(namespace: &LinuxNamespace) -> Option<&PathBuf> {
    namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(namespaces: &Value) -> Spec {
        let config = json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces}});
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn a_network_is_the_virtual_machines_own_a_new_one_or_that_of_a_path() {
        let wanted = |namespaces| Wanted::of(&spec(&namespaces));
        assert_eq!(wanted(json!([])), Wanted::Loopback);
        assert_eq!(wanted(json!([{"type": "pid", "path": "/p"}])), Wanted::Loopback);
        assert_eq!(wanted(json!([{"type": "network"}])), Wanted::New);
        assert_eq!(wanted(json!([{"type": "network", "path": ""}])), Wanted::New);
        assert_eq!(wanted(json!([{"type": "network", "path": "/n"}])), Wanted::Namespace("/n".into()));
    }

    #[test]
    fn in_the_guest_all_containers_have_the_network_of_the_sandbox() {
        let mut spec = spec(&json!([{"type": "pid"}, {"type": "network", "path": "/n"}]));
        Wanted::in_guest(&mut spec);
        assert_eq!(Wanted::of(&spec), Wanted::Loopback);
        assert_eq!(spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().len(), 1);
    }
}
