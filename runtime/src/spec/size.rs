//! How large a machine a configuration needs.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};
use sandbox_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS};

use super::SpecError;
use super::pod::{PodLimits, Role};

/// The least memory limit that a container may have, in MiB: below it a process does not even start.
pub const MIN_LIMIT_MIB: u64 = 4;

/// One part in so many of a container's memory is added for the kernel's own bookkeeping: a `struct page` of 64
/// bytes for each 4096, and as much again for page tables and slabs that no container is charged for.
const OVERHEAD_FRACTION: u64 = 32;

/// The shares that Kubernetes writes for one CPU.
const SHARES_OF_CPU: u64 = 1024;

/// What machines are sized by, besides the limits of their containers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MachineSizes {
    /// The memory of a machine whose container has no limit, in MiB.
    pub memory_mib: u32,
    /// The memory of the machine of a pod that has no limit, in MiB: several containers live in it.
    pub pod_memory_mib: u32,
    /// What the guest kernel, the image and the agent take, in MiB, whatever the size of the machine.
    pub overhead_mib: u32,
    /// The vCPUs of a machine whose container has no CPU limit. One boots fastest.
    pub vcpus: u8,
}

impl Default for MachineSizes {
    fn default() -> Self {
        Self { memory_mib: 512, pod_memory_mib: 1024, overhead_mib: 48, vcpus: 1 }
    }
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MachineSize {
    /// Guest memory.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
}

impl MachineSizes {
    /// The machine for a configuration. That of a pod has what the annotations say that all its containers may use.
    pub fn machine(&self, spec: &Spec) -> Result<MachineSize, SpecError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        if Role::of(spec)? == Role::Sandbox {
            return self.machine_of_pod(PodLimits::of(spec)?, resources);
        }
        let limit = resources.and_then(|r| r.memory().as_ref()).and_then(LinuxMemory::limit);
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let quota = cpu.and_then(|cpu| cpus_for_quota(cpu.quota(), cpu.period()));
        Ok(MachineSize { memory_mib: self.memory(limit, self.memory_mib)?, vcpus: self.vcpus(quota, cpu)? })
    }

    fn machine_of_pod(
        &self,
        limits: PodLimits,
        resources: Option<&LinuxResources>,
    ) -> Result<MachineSize, SpecError> {
        let quota = cpus_for_quota(limits.cpu_quota, limits.cpu_period);
        // Without a quota, the pod gets as many as it was promised.
        let cpus = quota.or_else(|| limits.cpu_shares.map(|shares| shares.div_ceil(SHARES_OF_CPU).max(1)));
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        Ok(MachineSize {
            memory_mib: self.memory(limits.memory_bytes, self.pod_memory_mib)?,
            vcpus: self.vcpus(cpus, cpu)?,
        })
    }

    /// Guest memory for a limit: that plus the stated overhead.
    fn memory(&self, limit: Option<i64>, default: u32) -> Result<u32, SpecError> {
        // -1 and 0 are how engines write "no limit".
        let Some(limit) = limit.and_then(|l| u64::try_from(l).ok()).filter(|l| *l > 0) else {
            return Ok(default);
        };
        if limit < MIN_LIMIT_MIB << 20 {
            return Err(SpecError::MemoryTooSmall { bytes: limit, min_mib: MIN_LIMIT_MIB });
        }
        let limit_mib = limit.div_ceil(1 << 20);
        let overhead = u64::from(self.overhead_mib) + limit_mib.div_ceil(OVERHEAD_FRACTION);
        u32::try_from(limit_mib + overhead)
            .ok()
            .filter(|mib| *mib <= MAX_MEMORY_MIB)
            .ok_or(SpecError::MemoryTooLarge { bytes: limit, max_mib: MAX_MEMORY_MIB })
    }

    /// vCPUs: enough for a quota, and for every CPU that the container names.
    fn vcpus(&self, wanted: Option<u64>, cpu: Option<&LinuxCpu>) -> Result<u8, SpecError> {
        let named = match cpu.and_then(|cpu| cpu.cpus().as_deref()) {
            Some(list) if !list.is_empty() => cpus_for_list(list)?,
            _ => 1,
        };
        let cpus = wanted.unwrap_or(self.vcpus.into()).max(named);
        u8::try_from(cpus)
            .ok()
            .filter(|cpus| *cpus <= MAX_VCPUS)
            .ok_or(SpecError::TooManyCpus { cpus, max: MAX_VCPUS })
    }
}

fn cpus_for_quota(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    const DEFAULT_PERIOD_MICROS: u64 = 100_000;
    let quota = quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0)?;
    let period = period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_MICROS);
    Some(quota.div_ceil(period))
}

/// One more than the highest CPU of a list such as `0-3,7`.
fn cpus_for_list(list: &str) -> Result<u64, SpecError> {
    let highest = |part: &str| part.rsplit('-').next()?.trim().parse::<u32>().ok();
    let highest =
        list.split(',').map(highest).collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max());
    highest.map(|cpu| u64::from(cpu) + 1).ok_or_else(|| SpecError::Value {
        path: "linux.resources.cpu.cpus".into(),
        why: format!("`{list}` is no list of CPUs such as `0-3,7`"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn size(resources: serde_json::Value) -> Result<MachineSize, SpecError> {
        let spec = json!({"ociVersion": "1.2.0", "linux": {"resources": resources}});
        MachineSizes::default().machine(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn without_limits_there_are_defaults() {
        let defaults = MachineSize { memory_mib: 512, vcpus: 1 };
        assert_eq!(size(json!({})).unwrap(), defaults);
        assert_eq!(
            size(json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100000}})).unwrap(),
            defaults
        );
    }

    #[test]
    fn memory_is_the_limit_and_the_overhead() {
        assert_eq!(size(json!({"memory": {"limit": 64 << 20}})).unwrap().memory_mib, 64 + 48 + 2);
        assert_eq!(size(json!({"memory": {"limit": 1u64 << 30}})).unwrap().memory_mib, 1024 + 48 + 32);
        assert_eq!(size(json!({"memory": {"limit": (64 << 20) + 1}})).unwrap().memory_mib, 65 + 48 + 3);
    }

    #[test]
    fn memory_that_no_machine_can_have_is_refused() {
        assert!(matches!(size(json!({"memory": {"limit": 4096}})), Err(SpecError::MemoryTooSmall { .. })));
        for limit in [1i64 << 40, i64::MAX] {
            assert!(matches!(
                size(json!({"memory": {"limit": limit}})),
                Err(SpecError::MemoryTooLarge { .. })
            ));
        }
    }

    #[test]
    fn a_pod_has_what_its_annotations_say() {
        let size = |annotations: serde_json::Value| {
            let mut annotations = annotations;
            annotations["io.kubernetes.cri.container-type"] = json!("sandbox");
            let spec = json!({"ociVersion": "1.2.0", "annotations": annotations,
                "linux": {"resources": {"cpu": {"shares": 2}, "memory": {"limit": 8 << 20}}}});
            MachineSizes::default().machine(&serde_json::from_value(spec).unwrap()).unwrap()
        };
        let of = |memory_mib, vcpus| MachineSize { memory_mib, vcpus };
        let (memory, cpu) = ("io.kubernetes.cri.sandbox-memory", "io.kubernetes.cri.sandbox-cpu-");
        let cpu = |name: &str| format!("{cpu}{name}");
        assert_eq!(size(json!({})), of(1024, 1));
        assert_eq!(size(json!({memory: "134217728", cpu("shares"): "2048"})), of(128 + 48 + 4, 2));
        let quota = json!({cpu("quota"): "250000", cpu("period"): "100000", cpu("shares"): "512"});
        assert_eq!(size(quota), of(1024, 3));
        assert_eq!(size(json!({memory: "0", cpu("quota"): "0", cpu("shares"): "2"})), of(1024, 1));
    }

    #[test]
    fn cpus_follow_from_quota_and_list() {
        let vcpus = |cpu| size(json!({"cpu": cpu})).map(|s| s.vcpus);
        assert_eq!(vcpus(json!({"quota": 150000, "period": 100000})).unwrap(), 2);
        assert_eq!(vcpus(json!({"quota": 50000, "period": 100000})).unwrap(), 1);
        assert_eq!(vcpus(json!({"quota": 400000})).unwrap(), 4);
        assert_eq!(vcpus(json!({"cpus": "0-2,5"})).unwrap(), 6);
        assert!(matches!(vcpus(json!({"cpus": "a-b"})), Err(SpecError::Value { .. })));
        assert!(matches!(vcpus(json!({"cpus": "4294967295"})), Err(SpecError::TooManyCpus { .. })));
        assert!(matches!(vcpus(json!({"quota": i64::MAX, "period": 1})), Err(SpecError::TooManyCpus { .. })));
    }
}
