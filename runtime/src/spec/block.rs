//! Which block devices of the host a container is given.
//!
//! A node in `linux.devices` alone is a number, and numbers of a virtual machine are its own kernel's. What says that
//! the host's device is meant is a rule that allows just that device, which engines write for each one that their user
//! names. Who may use all devices (a privileged container) names none, and gets none of the host.

use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};
use serde::{Deserialize, Serialize};

use super::SpecError;

/// The most block devices of a container.
const MAX_DEVICES: usize = 64;

/// A block device of the host that a container is given.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct HostBlock {
    /// Where it stands first in `linux.devices`.
    pub index: usize,
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
    /// Whether no rule lets the container write to it.
    pub read_only: bool,
}

/// What rules leave of a device.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Access {
    read: bool,
    write: bool,
}

/// Those of a configuration, each once.
pub fn of(spec: &Spec) -> Result<Vec<HostBlock>, SpecError> {
    let linux = spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    let rules = linux.and_then(|linux| linux.resources().as_ref()).and_then(|r| r.devices().as_deref());
    let mut found = BTreeMap::new();
    for (index, device) in devices.iter().enumerate().filter(|(_, d)| d.typ() == LinuxDeviceType::B) {
        let access = access(rules.unwrap_or_default(), (device.major(), device.minor()));
        if access == Access::default() {
            continue;
        }
        let number = |name: &str, number: i64| {
            u32::try_from(number).map_err(|_| SpecError::Value {
                path: format!("linux.devices[{index}].{name}"),
                why: format!("{number} is not a number of a device"),
            })
        };
        let (major, minor) = (number("major", device.major())?, number("minor", device.minor())?);
        found.entry((major, minor)).or_insert(HostBlock { index, major, minor, read_only: !access.write });
        if found.len() > MAX_DEVICES {
            let reason = format!("a container has at most {MAX_DEVICES} block devices of the host");
            return Err(SpecError::Unsupported { path: format!("linux.devices[{index}]"), reason });
        }
    }
    Ok(found.into_values().collect())
}

/// What the rules, in their order, allow of a device by its number; and what they take from it in any way.
fn access(rules: &[LinuxDeviceCgroup], device: (i64, i64)) -> Access {
    rules.iter().fold(Access::default(), |access, rule| {
        let any = |wanted: Option<i64>, is: i64| wanted.is_none_or(|wanted| wanted < 0 || wanted == is);
        let of_kind = matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B));
        let matches = of_kind && any(rule.major(), device.0) && any(rule.minor(), device.1);
        let names = rule.typ() == Some(LinuxDeviceType::B)
            && (rule.major(), rule.minor()) == (Some(device.0), Some(device.1));
        let letters = rule.access().as_deref().filter(|letters| !letters.is_empty()).unwrap_or("rwm");
        let (read, write) = (letters.contains('r'), letters.contains('w'));
        match rule.allow() {
            true if names => Access { read: access.read || read, write: access.write || write },
            false if matches => Access { read: access.read && !read, write: access.write && !write },
            _ => access,
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn blocks(devices: Value, rules: Value) -> Result<Vec<HostBlock>, String> {
        let config = json!({"ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "linux": {"devices": devices, "resources": {"devices": rules}}});
        of(&serde_json::from_value(config).unwrap()).map_err(|error| error.to_string())
    }

    fn disk(minor: i64) -> Value {
        json!({"path": format!("/dev/disk{minor}"), "type": "b", "major": 8, "minor": minor})
    }

    fn rule(allow: bool, minor: i64, access: &str) -> Value {
        json!({"allow": allow, "type": "b", "major": 8, "minor": minor, "access": access})
    }

    #[test]
    fn a_rule_that_names_a_device_gives_it() {
        let deny_all = json!({"allow": false, "access": "rwm"});
        let allow_all = json!({"allow": true, "access": "rwm"});
        let all_disks = json!({"allow": true, "type": "b", "access": "rwm"});
        let writable = HostBlock { index: 0, major: 8, minor: 16, read_only: false };
        let read_only = HostBlock { read_only: true, ..writable };
        for (rules, wanted) in [
            (json!([]), vec![]),
            (json!([allow_all]), vec![]),
            (json!([deny_all, all_disks]), vec![]),
            (json!([deny_all, rule(true, 17, "rwm")]), vec![]),
            (json!([deny_all, rule(true, 16, "m")]), vec![]),
            (json!([rule(true, 16, "rwm"), deny_all]), vec![]),
            (json!([deny_all, rule(true, 16, "rwm")]), vec![writable]),
            (json!([deny_all, rule(true, 16, "")]), vec![writable]),
            (json!([deny_all, rule(true, 16, "rm")]), vec![read_only]),
            (json!([deny_all, rule(true, 16, "rw"), rule(false, 16, "w")]), vec![read_only]),
        ] {
            assert_eq!(blocks(json!([disk(16)]), rules.clone()).unwrap(), wanted, "{rules}");
        }
    }

    #[test]
    fn each_device_once_and_none_that_is_no_block_device() {
        let mut again = disk(16);
        again["path"] = json!("/other");
        let character = json!({"path": "/dev/char", "type": "c", "major": 8, "minor": 18});
        let rules = json!([rule(true, 16, "rw"), rule(true, 17, "r"), rule(true, 18, "rw")]);
        let found = blocks(json!([character, disk(17), disk(16), again]), rules).unwrap();
        let found: Vec<_> = found.iter().map(|block| (block.index, block.minor, block.read_only)).collect();
        assert_eq!(found, [(2, 16, false), (1, 17, true)]);
        let wrong = blocks(json!([disk(-1)]), json!([rule(true, -1, "rw")])).unwrap_err();
        assert!(wrong.contains("`linux.devices[0].minor`: -1 is not"), "{wrong}");
    }
}
