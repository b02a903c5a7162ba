//! Which machines this host can run, and which of them `auto` takes.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use sandbox_vmm_api::{MachineKind, Probe, ProbedMachine};

use crate::kvm;
use crate::memory::{self, Layout};
use crate::qemu;

/// The memory of a machine that is only made to be probed.
const PROBE_MEMORY_BYTES: u64 = 1 << 20;

/// Finds out everything.
pub fn probe() -> Probe {
    judge(probe_kvm(), probe_qemu())
}

fn probe_kvm() -> ProbedMachine {
    let layout = Layout::new(PROBE_MEMORY_BYTES);
    let memory = match memory::map(layout) {
        Ok(memory) => memory,
        Err(error) => return ProbedMachine { usable: false, finding: error.to_string(), remedy: None },
    };
    match kvm::probe::probe(layout, memory, 1) {
        Ok((_, speed)) => ProbedMachine { usable: true, finding: speed.describe(), remedy: None },
        Err(unusable) => {
            ProbedMachine { usable: false, finding: unusable.finding, remedy: Some(unusable.remedy) }
        }
    }
}

fn probe_qemu() -> ProbedMachine {
    match find_program(qemu::PROGRAM) {
        Some(path) => {
            ProbedMachine { usable: true, finding: format!("{} is installed", path.display()), remedy: None }
        }
        None => ProbedMachine {
            usable: false,
            finding: format!("{} is not installed", qemu::PROGRAM),
            remedy: Some("apt install qemu-system-x86".to_owned()),
        },
    }
}

/// Whether the software machine's program is there.
pub fn qemu_is_installed() -> bool {
    find_program(qemu::PROGRAM).is_some()
}

fn judge(kvm: ProbedMachine, qemu: ProbedMachine) -> Probe {
    let (auto, reason) = if kvm.usable {
        (Some(MachineKind::Kvm), kvm.finding.clone())
    } else if qemu.usable {
        (Some(MachineKind::Qemu), kvm.finding.clone())
    } else {
        (None, format!("{}; {}", kvm.finding, qemu.finding))
    };
    Probe { auto, reason, kvm, qemu }
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| {
        candidate.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(usable: bool, finding: &str) -> ProbedMachine {
        ProbedMachine { usable, finding: finding.into(), remedy: None }
    }

    #[test]
    fn kvm_is_preferred_and_its_absence_is_the_reason() {
        let probe = judge(machine(true, "fast"), machine(true, "there"));
        assert_eq!((probe.auto, probe.reason.as_str()), (Some(MachineKind::Kvm), "fast"));
        let probe = judge(machine(false, "slow"), machine(true, "there"));
        assert_eq!((probe.auto, probe.reason.as_str()), (Some(MachineKind::Qemu), "slow"));
        let probe = judge(machine(false, "slow"), machine(false, "absent"));
        assert_eq!((probe.auto, probe.reason.as_str()), (None, "slow; absent"));
    }

    #[test]
    fn programs_are_found_by_path() {
        assert!(find_program("sh").is_some());
        assert_eq!(find_program("no-such-program-here"), None);
    }
}
