//! Which namespaces a container has of its own.
//!
//! A type that the configuration leaves out means the sandbox's own, that of the virtual machine.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};

/// Why a set of namespaces cannot be had.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum NamespaceError {
    /// A container without a mount namespace could not have a root of its own.
    #[error("linux.namespaces has no mount namespace: add {{\"type\": \"mount\"}}")]
    NoMount,
    /// The configuration names a namespace to join.
    #[error("linux.namespaces: joining the {0} namespace at a path is not supported: remove the path")]
    Path(Type),
}

/// The namespaces of a container.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Namespaces {
    flags: i32,
}

impl Namespaces {
    /// Reads the configuration.
    pub fn of(configured: &[LinuxNamespace]) -> Result<Self, NamespaceError> {
        let mut flags = 0;
        for namespace in configured {
            let kind = namespace.typ();
            if namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
                return Err(NamespaceError::Path(kind));
            }
            flags |= flag(kind);
        }
        if flags & libc::CLONE_NEWNS == 0 {
            return Err(NamespaceError::NoMount);
        }
        Ok(Self { flags })
    }

    /// Whether the container has this one of its own.
    pub fn has(self, kind: Type) -> bool {
        self.flags & flag(kind) != 0
    }

    /// The flags to clone its first process with.
    ///
    /// Two are left out, which the child makes itself. The root of a cgroup namespace is the cgroup of whoever makes
    /// it, so the child must be in its cgroup. The clocks of a time namespace are fixed when somebody is in it, so
    /// the child must still be outside.
    pub fn clone_flags(self) -> u64 {
        (self.flags & !(libc::CLONE_NEWCGROUP | libc::CLONE_NEWTIME)) as u64
    }

    /// The flags with which one more process joins. The pid namespace is left out: a process is born into it.
    pub fn join_flags(self) -> i32 {
        self.flags & !libc::CLONE_NEWPID
    }
}

fn flag(kind: Type) -> i32 {
    match kind {
        Type::Mount => libc::CLONE_NEWNS,
        Type::Cgroup => libc::CLONE_NEWCGROUP,
        Type::Uts => libc::CLONE_NEWUTS,
        Type::Ipc => libc::CLONE_NEWIPC,
        Type::Pid => libc::CLONE_NEWPID,
        Type::Network => libc::CLONE_NEWNET,
        Type::Time => libc::CLONE_NEWTIME,
        Type::User => libc::CLONE_NEWUSER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(kinds: &[Type]) -> Result<Namespaces, NamespaceError> {
        let list: Vec<LinuxNamespace> = kinds
            .iter()
            .map(|kind| {
                let mut namespace = LinuxNamespace::default();
                namespace.set_typ(*kind);
                namespace.set_path(None);
                namespace
            })
            .collect();
        Namespaces::of(&list)
    }

    #[test]
    fn cgroup_time_and_pid_namespaces_are_made_and_joined_in_their_own_way() {
        let found = namespaces(&[Type::Mount, Type::Pid, Type::Cgroup, Type::Time]).unwrap();
        assert_eq!(found.clone_flags(), (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64);
        let joined = libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP | libc::CLONE_NEWTIME;
        assert_eq!(found.join_flags(), joined);
        assert!(found.has(Type::Cgroup) && !found.has(Type::Network));
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        assert_eq!(namespaces(&[Type::Pid]), Err(NamespaceError::NoMount));
    }
}
