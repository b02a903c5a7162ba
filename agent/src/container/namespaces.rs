//! Which namespaces a container has of its own, and which it shares with another container.
//!
//! A type that the configuration leaves out means the sandbox's own, that of the virtual machine, unless it is shared.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};
use sandbox_protocol::Joined;

/// Why a set of namespaces cannot be had.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum NamespaceError {
    /// A container without a mount namespace could not have a root of its own.
    #[error("linux.namespaces has no mount namespace: add {{\"type\": \"mount\"}}")]
    NoMount,
    /// The configuration names a namespace to join.
    #[error("linux.namespaces: joining the {0} namespace at a path is not supported: remove the path")]
    Path(Type),
    /// It is to have one of its own and to share one.
    #[error("the {0} namespace cannot be the container's own and another's")]
    Twice(Type),
    /// It would have no right to enter it.
    #[error("the {0} namespace of another container cannot be joined from a user namespace of one's own")]
    OwnUsers(Type),
    /// The type cannot be shared.
    #[error("the {0} namespace of another container cannot be joined")]
    Shared(Type),
}

/// The namespaces that containers may share.
const SHARED: [Type; 4] = [Type::Network, Type::Ipc, Type::Uts, Type::Pid];

/// The namespaces of a container.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Namespaces {
    /// Of its own.
    flags: i32,
    /// Shared with others.
    shared: i32,
}

impl Namespaces {
    /// Reads the configuration, and what is shared besides.
    pub fn of(configured: &[LinuxNamespace], joined: &[Joined]) -> Result<Self, NamespaceError> {
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
        let mut shared = 0;
        for Joined { kind, .. } in joined {
            if !SHARED.contains(kind) {
                return Err(NamespaceError::Shared(*kind));
            }
            if flags & libc::CLONE_NEWUSER != 0 {
                return Err(NamespaceError::OwnUsers(*kind));
            }
            let flag = flag(*kind);
            if (flags | shared) & flag != 0 {
                return Err(NamespaceError::Twice(*kind));
            }
            shared |= flag;
        }
        Ok(Self { flags, shared })
    }

    /// Whether the container has this one of its own.
    pub fn has(self, kind: Type) -> bool {
        self.flags & flag(kind) != 0
    }

    /// Whether the container's processes have other process ids than the guest: in a namespace of its own, or in that
    /// of another container.
    pub fn has_pids(self) -> bool {
        (self.flags | self.shared) & libc::CLONE_NEWPID != 0
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
        (self.flags | self.shared) & !libc::CLONE_NEWPID
    }
}

/// The flag of a type, to clone or to join with.
pub fn flag(kind: Type) -> i32 {
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
        Namespaces::of(&list, &[])
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
    fn what_is_shared_is_joined_and_not_made() {
        let own = |kind| {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(kind).set_path(None);
            namespace
        };
        let joined = |kinds: &[Type]| -> Vec<Joined> {
            kinds.iter().map(|kind| Joined { kind: *kind, container: "other".into() }).collect()
        };
        let found = Namespaces::of(&[own(Type::Mount)], &joined(&[Type::Ipc, Type::Pid])).unwrap();
        assert_eq!(found.clone_flags(), libc::CLONE_NEWNS as u64);
        assert_eq!(found.join_flags(), libc::CLONE_NEWNS | libc::CLONE_NEWIPC);
        assert!(found.has_pids() && !found.has(Type::Pid) && !found.has(Type::Ipc));
        let twice = Namespaces::of(&[own(Type::Mount), own(Type::Ipc)], &joined(&[Type::Ipc]));
        assert_eq!(twice, Err(NamespaceError::Twice(Type::Ipc)));
        let mount = Namespaces::of(&[own(Type::Mount)], &joined(&[Type::Cgroup]));
        assert_eq!(mount, Err(NamespaceError::Shared(Type::Cgroup)));
        let users = Namespaces::of(&[own(Type::Mount), own(Type::User)], &joined(&[Type::Ipc]));
        assert_eq!(users, Err(NamespaceError::OwnUsers(Type::Ipc)));
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        assert_eq!(namespaces(&[Type::Pid]), Err(NamespaceError::NoMount));
    }
}
