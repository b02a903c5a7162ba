//! The pod that a container joins, as the host knows it.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use sandbox_protocol::Joined;

use super::Error;
use crate::spec::{namespace_path, process_of_namespace, spec_of, take_joined};
use crate::state::{Record, SandboxId, Status, find, list};

/// A pod that runs.
pub struct Pod {
    sandbox: Record,
    /// The configuration of its first container.
    spec: Spec,
    /// The containers that have joined it.
    members: Vec<Record>,
}

impl Pod {
    /// Finds one by its first container.
    pub fn find(root: &Path, id: &SandboxId) -> Result<Self, Error> {
        let (_, sandbox) = find(root, id)?;
        let is_member = sandbox.sandbox.is_some();
        match sandbox.status {
            _ if is_member => {
                return Err(Error::Failed(format!(
                    "container {id} is not the first of a pod: it has joined one"
                )));
            }
            Status::Created | Status::Running | Status::Paused => {}
            status => {
                let status = status.name();
                return Err(Error::Failed(format!(
                    "the pod of container {id} cannot be joined: it is {status}"
                )));
            }
        }
        let (mut members, _) = list(root)?;
        members.retain(|record| record.sandbox.as_ref() == Some(id));
        let spec = spec_of(&sandbox.bundle)?;
        Ok(Self { sandbox, spec, members })
    }

    /// Turns the paths of namespaces in a configuration into what the agent understands.
    pub fn joined(&self, spec: &mut Spec) -> Result<Vec<Joined>, Error> {
        Ok(take_joined(spec, |kind, path| self.whose(kind, path))?)
    }

    /// The container whose namespace a path is: by the process that stands for it, or, of the first one, by the path
    /// that its own configuration names.
    fn whose(&self, kind: LinuxNamespaceType, path: &Path) -> Option<SandboxId> {
        let sandbox = || Some(self.sandbox.id.clone());
        if namespace_path(&self.spec, kind).as_deref() == Some(path) {
            return sandbox();
        }
        let pid = process_of_namespace(kind, path)?;
        if pid == self.sandbox.pid {
            return sandbox();
        }
        // Other members have namespaces of their own only of this kind.
        let by_pid = |record: &&Record| record.pid == pid && kind == LinuxNamespaceType::Pid;
        self.members.iter().find(by_pid).map(|record| record.id.clone())
    }
}
