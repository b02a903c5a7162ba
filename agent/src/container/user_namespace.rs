//! User namespaces: a container whose root is an ordinary user of the guest.
//!
//! The child is born into its user namespace, and its other namespaces belong to that one. Until the agent has
//! written its maps ([`UserNamespace::map`]) it is nobody, so it waits ([`become_root`] comes after the word). Then
//! it is root, with every right over its namespaces and none over the guest. What only the guest's root can do for a
//! process, the agent does from outside: see [`super::rights`]. The overlay over a root is the agent's too: the
//! attributes that it keeps its records in are for the guest's root only.
//!
//! Ids on files are the guest's, and the host's on what is shared: nothing is changed on disk, and a file of an id
//! that the maps do not have belongs to nobody.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxIdMapping, Spec};
use rustix::process::Pid;
use rustix::thread::{Gid, Uid};

use super::setup::SetupError;

/// A user namespace could not be had.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    /// The root of the container has no id.
    #[error("linux.{0}: the id 0 of the container is not in it: add a mapping with a containerID of 0")]
    NoRoot(&'static str),
    /// The kernel refused a map.
    #[error("linux.{field}: the guest's kernel refuses it in {path}: {source}")]
    Refused {
        /// Where in config.json it stands.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

const UIDS: &str = "uidMappings";
const GIDS: &str = "gidMappings";

/// The maps of a container with a user namespace.
#[derive(Clone, Copy, Debug)]
pub struct UserNamespace<'a> {
    uids: &'a [LinuxIdMapping],
    gids: &'a [LinuxIdMapping],
    root: Owner,
}

/// A user and a group of the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Owner {
    /// The user.
    pub uid: Uid,
    /// The group.
    pub gid: Gid,
}

impl<'a> UserNamespace<'a> {
    /// Reads the maps of a configuration that asks for a user namespace.
    pub fn of(spec: &'a Spec) -> Result<Self, UserNamespaceError> {
        let linux = spec.linux().as_ref();
        let uids = linux.and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default();
        let gids = linux.and_then(|linux| linux.gid_mappings().as_deref()).unwrap_or_default();
        let root = Owner {
            uid: Uid::from_raw(outside(uids, 0).ok_or(UserNamespaceError::NoRoot(UIDS))?),
            gid: Gid::from_raw(outside(gids, 0).ok_or(UserNamespaceError::NoRoot(GIDS))?),
        };
        Ok(Self { uids, gids, root })
    }

    /// What the container's root is in the guest.
    pub fn root(&self) -> Owner {
        self.root
    }

    /// Writes the maps for a child that waits for them.
    pub fn map(&self, child: Pid) -> Result<(), UserNamespaceError> {
        for (field, file, mappings) in [(UIDS, "uid_map", self.uids), (GIDS, "gid_map", self.gids)] {
            let path = PathBuf::from(format!("/proc/{}/{file}", child.as_raw_nonzero()));
            // All of it in one write: the kernel takes no second one.
            std::fs::write(&path, lines(mappings)).map_err(|source| UserNamespaceError::Refused {
                field,
                path,
                source,
            })?;
        }
        Ok(())
    }
}

/// The id outside that an id inside stands for.
fn outside(mappings: &[LinuxIdMapping], inside: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = inside.checked_sub(mapping.container_id()).filter(|offset| *offset < mapping.size())?;
        mapping.host_id().checked_add(offset)
    })
}

/// Inside, outside, how many: a line for each.
fn lines(mappings: &[LinuxIdMapping]) -> String {
    mappings
        .iter()
        .map(|mapping| format!("{} {} {}\n", mapping.container_id(), mapping.host_id(), mapping.size()))
        .collect()
}

/// Makes this process root of the user namespace that it is in, which has its maps.
pub fn become_root() -> Result<(), SetupError> {
    let step = || SetupError::step::<rustix::io::Errno>("become root of the container's user namespace");
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_groups(&[]).map_err(step())?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step())?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(uids: &str, gids: &str) -> Spec {
        let mut spec = Spec::default();
        let linux = format!(r#"{{"uidMappings": {uids}, "gidMappings": {gids}}}"#);
        spec.set_linux(Some(serde_json::from_str(&linux).unwrap()));
        spec
    }

    const TWO: &str = r#"[{"containerID": 10, "hostID": 1000, "size": 5}, {"containerID": 0, "hostID": 70000, "size": 10}]"#;

    #[test]
    fn root_is_found_in_the_map_that_has_it() {
        let spec = spec(TWO, r#"[{"containerID": 0, "hostID": 5, "size": 1}]"#);
        let root = UserNamespace::of(&spec).unwrap().root();
        assert_eq!(root, Owner { uid: Uid::from_raw(70000), gid: Gid::from_raw(5) });
    }

    #[test]
    fn maps_without_root_are_refused() {
        let error = UserNamespace::of(&spec(TWO, "[]")).unwrap_err().to_string();
        assert!(error.starts_with("linux.gidMappings: the id 0"), "{error}");
        let mapping = r#"[{"containerID": 1, "hostID": 5, "size": 1}]"#;
        assert!(UserNamespace::of(&spec(mapping, TWO)).is_err());
    }

    #[test]
    fn an_id_is_outside_where_its_mapping_puts_it() {
        let mappings: Vec<LinuxIdMapping> = serde_json::from_str(TWO).unwrap();
        assert_eq!(lines(&mappings), "10 1000 5\n0 70000 10\n");
        assert_eq!([14, 15, 9].map(|id| outside(&mappings, id)), [Some(1004), None, Some(70009)]);
        let last = r#"[{"containerID": 0, "hostID": 4294967295, "size": 2}]"#;
        assert_eq!(outside(&serde_json::from_str::<Vec<_>>(last).unwrap(), 1), None);
    }
}
