//! Ids for the processes of a machine: a user and a group of its own for each, which own nothing on the host.
//!
//! They are a number made of the id of the process that owns the machine, so no two machines that live have the same,
//! and none has to be kept. They lie in a range that no distribution, user database or container engine gives out by
//! default: systemd leaves it unused, and what directory services are mapped to ends below it. In a user namespace that
//! has no such ids the machine keeps those of its caller, who is not the host's root there.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use sandbox_vmm_api::ProcessIds;

/// Where the ids of `sandbox-vmm` begin, and those of QEMU. Process ids have 22 bits at most.
const VMM: u32 = 0x7800_0000;
const QEMU: u32 = 0x7900_0000;

/// The ids for the machine of this process; none where it has no choice.
pub fn of_machine() -> Option<ProcessIds> {
    let own = std::process::id();
    let ids = ProcessIds { vmm: VMM + own, qemu: QEMU + own };
    let there = |map| fs::read_to_string(map).is_ok_and(|map| has(&map, ids.vmm) && has(&map, ids.qemu));
    let may_choose = rustix::process::geteuid().is_root();
    (may_choose && there("/proc/self/uid_map") && there("/proc/self/gid_map")).then_some(ids)
}

/// Whether a map of ids has one: lines of the first inside, the first outside, and how many.
fn has(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>().unwrap_or(0));
        let (first, _, count) = (numbers.next(), numbers.next(), numbers.next());
        first.zip(count).is_some_and(|(first, count)| id.checked_sub(first).is_some_and(|at| at < count))
    })
}

/// Opens a directory, or a socket, to the machine's process, which may go through the one and connect to the other.
pub fn open_to(ids: ProcessIds, path: &Path, mode: u32) -> io::Result<()> {
    chown(path, None, Some(ids.vmm))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_what_is_in_its_ranges() {
        assert!(has("         0          0 4294967295\n", VMM));
        let two = "0 1000 1\n1 100000 65536\n";
        for (id, there) in [(0, true), (1, true), (65536, true), (65537, false), (VMM, false)] {
            assert_eq!(has(two, id), there, "{id}");
        }
        assert!(!has("", 0) && !has("nonsense", 0));
    }

    #[test]
    fn the_two_ranges_are_apart_for_any_process() {
        const LARGEST_PROCESS_ID: u32 = 1 << 22;
        const { assert!(VMM + LARGEST_PROCESS_ID < QEMU && QEMU + LARGEST_PROCESS_ID < 0x7ffe_0000) };
    }
}
