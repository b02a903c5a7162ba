//! The maps of user namespaces and of mounts: which ids of a container, or on a disk, stand for which outside.

use oci_spec::runtime::{Linux, LinuxIdMapping, Mount, Spec};
use sandbox_vmm_api::{IdMap, IdRange};

use super::SpecError;
use super::validate::is_bind;

/// The most lines that the kernel takes in a map (`user_namespaces(7)`).
const MAX_MAPPINGS: usize = 340;

/// Checks the maps of a configuration, which belong to a user namespace.
pub fn check(spec: &Spec, own_users: bool) -> Result<(), SpecError> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let user = spec.process().as_ref().map(|process| process.user());
    let groups = user.and_then(|user| user.additional_gids().as_deref()).unwrap_or_default();
    let uids = user.map(|user| ("process.user.uid".to_owned(), user.uid()));
    let gids = user.map(|user| ("process.user.gid".to_owned(), user.gid()));
    let named = |(index, gid): (usize, &u32)| (format!("process.user.additionalGids[{index}]"), *gid);
    let gids = gids.into_iter().chain(groups.iter().enumerate().map(named));
    check_one("linux.uidMappings", linux.uid_mappings(), own_users, uids.into_iter())?;
    check_one("linux.gidMappings", linux.gid_mappings(), own_users, gids)
}

fn check_one(
    path: &str,
    mappings: &Option<Vec<LinuxIdMapping>>,
    own_users: bool,
    mut used: impl Iterator<Item = (String, u32)>,
) -> Result<(), SpecError> {
    let mappings = mappings.as_deref().unwrap_or_default();
    match (own_users, mappings.is_empty()) {
        (false, true) => return Ok(()),
        (false, false) => {
            return Err(value(
                path,
                "it needs a user namespace: add {\"type\": \"user\"} to linux.namespaces",
            ));
        }
        (true, true) => return Err(value(path, "it is missing, and a user namespace needs it")),
        (true, false) => check_mappings(path, mappings)?,
    }
    if !has(mappings, 0) {
        return Err(value(path, "the id 0 is not in it: add a mapping with a containerID of 0"));
    }
    match used.find(|(_, id)| !has(mappings, *id)) {
        Some((path_of_id, id)) => Err(value(&path_of_id, &format!("{id} is not in {path}"))),
        None => Ok(()),
    }
}

/// The options that ask for a mapping, for the mount or for those below it too.
const OPTIONS: [&str; 2] = ["idmap", "ridmap"];

/// Checks what a mount says about ids.
pub fn check_mount(index: usize, mount: &Mount, linux: Option<&Linux>) -> Result<(), SpecError> {
    let lists = [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())];
    let lists = lists.map(|(name, list)| (name, list.as_deref().unwrap_or_default()));
    let named = lists.iter().find(|(_, list)| !list.is_empty());
    let option = mount.options().iter().flatten().find(|option| OPTIONS.contains(&option.as_str()));
    let path = match (named, option) {
        (Some((name, _)), _) => format!("mounts[{index}].{name}"),
        (None, Some(_)) => format!("mounts[{index}].options"),
        (None, None) => return Ok(()),
    };
    if !is_bind(mount) {
        let reason = "only the ids of bind mounts can be mapped".into();
        return Err(SpecError::Unsupported { path, reason });
    }
    if let (None, Some(option)) = (named, option) {
        let own = linux.and_then(|linux| linux.uid_mappings().as_ref()).is_some_and(|list| !list.is_empty());
        let why = format!("`{option}` needs mappings: of the mount, or of a user namespace");
        return if own { Ok(()) } else { Err(value(&path, &why)) };
    }
    for (name, list) in lists {
        let path = format!("mounts[{index}].{name}");
        if list.is_empty() {
            return Err(value(&path, "it is missing, and the other kind of ids is mapped"));
        }
        check_mappings(&path, list)?;
    }
    Ok(())
}

/// Takes what a bind mount says about ids out of it, for the machine: the guest sees the result.
pub fn take(mount: &mut Mount, linux: Option<&Linux>) -> Option<IdMap> {
    let options = mount.options().clone().unwrap_or_default();
    let (asked, kept): (Vec<_>, Vec<_>) =
        options.into_iter().partition(|option| OPTIONS.contains(&option.as_str()));
    let own = (mount.uid_mappings().clone(), mount.gid_mappings().clone());
    let (uids, gids) = match own {
        (Some(uids), Some(gids)) if !uids.is_empty() => (uids, gids),
        _ if asked.is_empty() => return None,
        _ => (linux?.uid_mappings().clone()?, linux?.gid_mappings().clone()?),
    };
    mount.set_options(Some(kept)).set_uid_mappings(None).set_gid_mappings(None);
    let recursive = asked.iter().any(|option| option == "ridmap");
    Some(IdMap { uids: ranges(&uids), gids: ranges(&gids), recursive })
}

fn ranges(mappings: &[LinuxIdMapping]) -> Vec<IdRange> {
    let range = |mapping: &LinuxIdMapping| IdRange {
        on_disk: mapping.container_id(),
        in_guest: mapping.host_id(),
        count: mapping.size(),
    };
    mappings.iter().map(range).collect()
}

/// Checks what the kernel would refuse without saying why.
fn check_mappings(path: &str, mappings: &[LinuxIdMapping]) -> Result<(), SpecError> {
    if mappings.len() > MAX_MAPPINGS {
        let why = format!("it has {} mappings, and the kernel takes {MAX_MAPPINGS}", mappings.len());
        return Err(value(path, &why));
    }
    for (index, mapping) in mappings.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if mapping.size() == 0 {
            return Err(value(&format!("{path}.size"), "it is 0: there is nothing to map"));
        }
        let last = mapping.size() - 1;
        for (name, first) in [("containerID", mapping.container_id()), ("hostID", mapping.host_id())] {
            // The highest number is no id: it means "none".
            if first.checked_add(last).is_none_or(|last| last == u32::MAX) {
                return Err(value(&format!("{path}.{name}"), "it reaches beyond the last id, 4294967294"));
            }
        }
        let earlier = mappings.iter().take(index);
        if let Some(other) = earlier.into_iter().position(|other| overlap(other, mapping)) {
            return Err(value(&path, &format!("it has ids of the mapping {other} as well")));
        }
    }
    Ok(())
}

fn overlap(a: &LinuxIdMapping, b: &LinuxIdMapping) -> bool {
    let meet = |a: u32, b: u32, a_size: u32, b_size: u32| match a <= b {
        true => b - a < a_size,
        false => a - b < b_size,
    };
    meet(a.container_id(), b.container_id(), a.size(), b.size())
        || meet(a.host_id(), b.host_id(), a.size(), b.size())
}

fn has(mappings: &[LinuxIdMapping], id: u32) -> bool {
    mappings
        .iter()
        .any(|mapping| id.checked_sub(mapping.container_id()).is_some_and(|offset| offset < mapping.size()))
}

fn value(path: &str, why: &str) -> SpecError {
    SpecError::Value { path: path.into(), why: why.into() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn error(uids: Value, gids: Value, user: Value) -> Result<(), String> {
        let config = json!({"ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sh"], "user": user},
            "linux": {"uidMappings": uids, "gidMappings": gids}});
        check(&serde_json::from_value(config).unwrap(), true).map_err(|error| error.to_string())
    }

    fn map(inside: u32, outside: u32, size: u32) -> Value {
        json!({"containerID": inside, "hostID": outside, "size": size})
    }

    #[test]
    fn each_rule_has_its_error() {
        let root = json!({"uid": 0, "gid": 0});
        let good = json!([map(0, 100_000, 1000), map(1000, 5000, 1)]);
        error(good.clone(), good.clone(), json!({"uid": 1000, "gid": 999, "additionalGids": [1000]}))
            .unwrap();
        let many: Vec<Value> = (0..341).map(|n| map(n, n, 1)).collect();
        for (uids, gids, user, wanted) in [
            (json!([]), good.clone(), root.clone(), "`linux.uidMappings`: it is missing"),
            (good.clone(), json!(null), root.clone(), "`linux.gidMappings`: it is missing"),
            (json!([map(1, 5, 1)]), good.clone(), root.clone(), "`linux.uidMappings`: the id 0 is not"),
            (json!([map(0, 5, 0)]), good.clone(), root.clone(), "`linux.uidMappings[0].size`: it is 0"),
            (json!([map(0, u32::MAX - 1, 2)]), good.clone(), root.clone(), "`linux.uidMappings[0].hostID`"),
            (json!([map(u32::MAX, 0, 1)]), good.clone(), root.clone(), "`linux.uidMappings[0].containerID`"),
            (
                json!([map(0, 5, 9), map(9, 13, 2)]),
                good.clone(),
                root.clone(),
                "`linux.uidMappings[1]`: it has",
            ),
            (
                json!([map(5, 50, 9), map(0, 1, 6)]),
                good.clone(),
                root.clone(),
                "`linux.uidMappings[1]`: it has",
            ),
            (json!(many), good.clone(), root.clone(), "`linux.uidMappings`: it has 341 mappings"),
            (
                good.clone(),
                good.clone(),
                json!({"uid": 1001, "gid": 0}),
                "`process.user.uid`: 1001 is not in",
            ),
            (
                good.clone(),
                good.clone(),
                json!({"uid": 0, "gid": 2000}),
                "`process.user.gid`: 2000 is not in",
            ),
            (
                good.clone(),
                good.clone(),
                json!({"uid": 0, "gid": 0, "additionalGids": [7, 1001]}),
                "`process.user.additionalGids[1]`: 1001 is not in linux.gidMappings",
            ),
        ] {
            let message = error(uids, gids, user).unwrap_err();
            assert!(message.contains(wanted), "{wanted}: {message}");
        }
    }

    fn bind(rest: Value) -> Mount {
        let mut mount = json!({"destination": "/a", "type": "bind", "source": "/a"});
        mount.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        serde_json::from_value(mount).unwrap()
    }

    #[test]
    fn a_mount_has_its_own_maps_or_those_of_the_user_namespace() {
        let linux: Linux =
            serde_json::from_value(json!({"uidMappings": [map(0, 7, 1)], "gidMappings": [map(0, 8, 1)]}))
                .unwrap();
        let one = |on_disk, in_guest| vec![IdRange { on_disk, in_guest, count: 1 }];
        let mut own =
            bind(json!({"uidMappings": [map(1, 2, 1)], "gidMappings": [map(3, 4, 1)], "options": ["ro"]}));
        check_mount(0, &own, None).unwrap();
        let taken = take(&mut own, Some(&linux));
        assert_eq!(taken, Some(IdMap { uids: one(1, 2), gids: one(3, 4), recursive: false }));
        assert_eq!(own, bind(json!({"options": ["ro"]})));
        let mut asked = bind(json!({"options": ["rbind", "ridmap"]}));
        check_mount(0, &asked, Some(&linux)).unwrap();
        let taken = take(&mut asked, Some(&linux));
        assert_eq!(taken, Some(IdMap { uids: one(0, 7), gids: one(0, 8), recursive: true }));
        assert_eq!(asked.options().as_deref(), Some(&["rbind".to_owned()][..]));
        assert_eq!(take(&mut bind(json!({})), Some(&linux)), None);
    }

    #[test]
    fn a_mount_whose_ids_cannot_be_mapped_is_named() {
        let ids = json!([map(0, 1, 1)]);
        let tmpfs = json!({"destination": "/a", "type": "tmpfs", "uidMappings": ids, "gidMappings": ids});
        for (mount, wanted) in [
            (serde_json::from_value(tmpfs).unwrap(), "`mounts[3].uidMappings`: not supported"),
            (bind(json!({"uidMappings": ids})), "`mounts[3].gidMappings`: it is missing"),
            (bind(json!({"options": ["idmap"]})), "`mounts[3].options`: `idmap` needs mappings"),
            (
                bind(json!({"uidMappings": [map(0, 1, 0)], "gidMappings": ids})),
                "`mounts[3].uidMappings[0].size`: it is 0",
            ),
        ] {
            let message = check_mount(3, &mount, None).unwrap_err().to_string();
            assert!(message.contains(wanted), "{wanted}: {message}");
        }
    }

    #[test]
    fn maps_belong_to_a_user_namespace() {
        let mut spec = Spec::default();
        let linux = json!({"uidMappings": [map(0, 1, 1)]});
        spec.set_linux(Some(serde_json::from_value(linux).unwrap()));
        assert!(check(&spec, false).unwrap_err().to_string().contains("it needs a user namespace"));
        check(&Spec::default(), false).unwrap();
    }
}
