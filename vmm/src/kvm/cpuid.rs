//! What the guest's `cpuid` instruction says.
//!
//! It starts from what KVM supports on this host, and is changed where a virtual processor differs from the
//! host's: its own identifier, how many there are, that there is a hypervisor, and what is left out on purpose.
//!
//! Left out: nested virtualization (VMX and SVM) and the performance counters, which are large parts of KVM
//! that a guest would otherwise reach; and asynchronous page faults, which can make a vCPU spin.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// Bits of leaf 1, ecx.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Bit of leaf 1, edx: more than one logical processor in the package.
const HYPER_THREADING: u32 = 1 << 28;
/// Bits of leaf 0x8000_0001, ecx.
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const PERFORMANCE_COUNTERS: u32 = 0b11 << 23;
/// Bits of KVM's own leaf 0x4000_0001, eax: asynchronous page faults and two refinements.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Level types of the topology leaves.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The leaves that this host supports.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// The leaves of one vCPU.
pub fn for_vcpu(supported: &CpuId, id: u8, vcpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        patch(entry, Topology { id: id.into(), vcpus: vcpus.into() });
    }
    cpuid
}

#[derive(Clone, Copy)]
struct Topology {
    id: u32,
    vcpus: u32,
}

impl Topology {
    /// How many bits of an identifier tell the cores of the one package apart.
    fn core_bits(self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }
}

fn patch(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    match entry.function {
        0x1 => {
            entry.ecx = (entry.ecx & !VMX) | TSC_DEADLINE | HYPERVISOR;
            entry.ebx = (entry.ebx & 0x0000_ffff) | (topology.vcpus << 16) | (topology.id << 24);
            entry.edx =
                if topology.vcpus > 1 { entry.edx | HYPER_THREADING } else { entry.edx & !HYPER_THREADING };
        }
        0x4 => patch_caches(entry, topology),
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0xb | 0x1f => patch_levels(entry, topology),
        0x4000_0001 => entry.eax &= !ASYNC_PAGE_FAULTS,
        0x8000_0001 => entry.ecx &= !(SVM | TOPOLOGY_EXTENSIONS | PERFORMANCE_COUNTERS),
        0x8000_0008 => entry.ecx = (topology.core_bits() << 12) | (topology.vcpus - 1),
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Intel's caches: the first two levels belong to one core, the last to all.
fn patch_caches(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let (kind, level) = (entry.eax & 0x1f, (entry.eax >> 5) & 7);
    if kind == 0 {
        return;
    }
    let sharing = if level >= 3 { topology.vcpus - 1 } else { 0 };
    let cores = (topology.vcpus - 1).min(0x3f);
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
}

/// Intel's topology: one package, whose cores have one thread each.
fn patch_levels(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    entry.edx = topology.id;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, LEVEL_THREAD << 8),
        1 => (topology.core_bits(), topology.vcpus, 1 | LEVEL_CORE << 8),
        index => (0, 0, index),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patched(function: u32, index: u32, id: u8, vcpus: u8) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        let entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[entry]).unwrap();
        for_vcpu(&supported, id, vcpus).as_slice()[0]
    }

    #[test]
    fn a_processor_knows_itself_and_the_hypervisor() {
        let leaf = patched(1, 0, 3, 4);
        assert_eq!((leaf.ebx >> 24, (leaf.ebx >> 16) & 0xff), (3, 4));
        assert_eq!(leaf.ecx & (VMX | HYPERVISOR), HYPERVISOR);
        assert_eq!(patched(1, 0, 0, 1).edx & HYPER_THREADING, 0);
    }

    #[test]
    fn levels_describe_one_package() {
        assert_eq!(patched(0xb, 0, 2, 3).edx, 2);
        let cores = patched(0xb, 1, 2, 3);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 0x201));
        assert_eq!(patched(0xb, 2, 2, 3).ebx, 0);
    }

    #[test]
    fn nested_virtualization_and_counters_are_left_out() {
        assert_eq!(patched(0x8000_0001, 0, 0, 1).ecx & (SVM | PERFORMANCE_COUNTERS), 0);
        assert_eq!(patched(0xa, 0, 0, 1).eax, 0);
        assert_eq!(patched(0x4000_0001, 0, 0, 1).eax & (1 << 14), 0);
    }
}
