//! How the kernel runs a process: its scheduler, its priority for I/O, its CPUs and its personality.

use oci_spec::runtime::{
    ExecCPUAffinity, IOPriorityClass, Linux, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain,
    LinuxSchedulerFlag as Flag, LinuxSchedulerPolicy as Policy, Process, Scheduler,
};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Why a process cannot be run as configured.
#[derive(Debug, thiserror::Error)]
pub enum SchedulingError {
    /// The kernel refused one of the settings.
    #[error("{field}: the guest's kernel refuses {value}: {source}")]
    Refused {
        /// Where in config.json it stands.
        field: &'static str,
        /// What was asked for.
        value: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A list of CPUs is none.
    #[error("{field}: {list:?} is not a list of CPUs from 0 to {last}, such as 0-1,3", last = CpuSet::MAX_CPU - 1)]
    Cpus {
        /// Where in config.json it stands.
        field: &'static str,
        /// The list.
        list: String,
    },
}

/// Sets the priorities of a child, or of this process, which its program keeps.
pub fn apply(child: Option<Pid>, process: &Process) -> Result<(), SchedulingError> {
    if let Some(priority) = process.io_priority() {
        set_io_priority(child, priority)?;
    }
    process.scheduler().as_ref().map_or(Ok(()), |scheduler| set_scheduler(child, scheduler))
}

/// Sets the personality of this process, which its program keeps.
pub fn take_personality(linux: Option<&Linux>) -> Result<(), SchedulingError> {
    linux.and_then(|linux| linux.personality().as_ref()).map_or(Ok(()), set_personality)
}

/// The kernel's `struct sched_attr`, with the fields that came after those of libc's.
#[derive(Debug, PartialEq)]
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    least_utilization: u32,
    most_utilization: u32,
}

impl Attributes {
    fn of(scheduler: &Scheduler) -> Self {
        let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| flags | flag_bit(*flag));
        Self {
            size: size_of::<Self>() as u32,
            policy: policy_number(*scheduler.policy()),
            flags,
            nice: scheduler.nice().unwrap_or_default(),
            // A negative priority becomes one that the kernel refuses.
            priority: scheduler.priority().unwrap_or_default().cast_unsigned(),
            runtime: scheduler.runtime().unwrap_or_default(),
            deadline: scheduler.deadline().unwrap_or_default(),
            period: scheduler.period().unwrap_or_default(),
            least_utilization: 0,
            most_utilization: 0,
        }
    }
}

/// The numbers of `linux/sched.h`.
fn policy_number(policy: Policy) -> u32 {
    match policy {
        Policy::SchedOther => 0,
        Policy::SchedFifo => 1,
        Policy::SchedRr => 2,
        Policy::SchedBatch => 3,
        Policy::SchedIso => 4,
        Policy::SchedIdle => 5,
        Policy::SchedDeadline => 6,
    }
}

fn flag_bit(flag: Flag) -> u64 {
    match flag {
        Flag::SchedResetOnFork => 0x01,
        Flag::SchedFlagReclaim => 0x02,
        Flag::SchedFlagDLOverrun => 0x04,
        Flag::SchedFlagKeepPolicy => 0x08,
        Flag::SchedFlagKeepParams => 0x10,
        Flag::SchedFlagUtilClampMin => 0x20,
        Flag::SchedFlagUtilClampMax => 0x40,
    }
}

fn set_scheduler(child: Option<Pid>, scheduler: &Scheduler) -> Result<(), SchedulingError> {
    let attributes = Attributes::of(scheduler);
    // SAFETY: the structure is valid, says its own size, and is only read.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, Pid::as_raw(child), &raw const attributes, 0) };
    outcome(set, "process.scheduler", || scheduler.policy().to_string())
}

const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: i64 = 13;

fn set_io_priority(child: Option<Pid>, wanted: &LinuxIOPriority) -> Result<(), SchedulingError> {
    // SAFETY: the call has no memory effects.
    let set = unsafe {
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, Pid::as_raw(child), io_priority(wanted))
    };
    outcome(set, "process.ioPriority", || format!("{} {}", wanted.class(), wanted.priority()))
}

/// Class and priority in the kernel's one number.
fn io_priority(wanted: &LinuxIOPriority) -> i64 {
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    class << IOPRIO_CLASS_SHIFT | wanted.priority()
}

/// The domains of `linux/personality.h`.
const PER_LINUX: libc::c_ulong = 0;
const PER_LINUX32: libc::c_ulong = 8;

fn set_personality(wanted: &LinuxPersonality) -> Result<(), SchedulingError> {
    let domain = match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => PER_LINUX,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    };
    // SAFETY: the call changes how later system calls of this process behave, and no memory.
    let set = unsafe { libc::personality(domain) };
    outcome(set.into(), "linux.personality", || wanted.domain().to_string())
}

fn outcome(
    returned: i64,
    field: &'static str,
    value: impl FnOnce() -> String,
) -> Result<(), SchedulingError> {
    if returned >= 0 {
        return Ok(());
    }
    Err(SchedulingError::Refused { field, value: value(), source: std::io::Error::last_os_error() })
}

const INITIAL: &str = "process.execCPUAffinity.initial";
const FINAL: &str = "process.execCPUAffinity.final";

/// While this lives, the agent and what it clones run on the initial CPUs of one more process.
///
/// The child is born into the container's cgroup. What becomes of its CPUs there is the kernel's business, unless
/// the configuration has final ones.
pub struct InitialCpus {
    before: Option<CpuSet>,
}

impl InitialCpus {
    /// Moves the agent.
    pub fn take(process: &Process) -> Result<Self, SchedulingError> {
        let affinity = process.exec_cpu_affinity().as_ref();
        let Some(list) = affinity.and_then(|affinity| listed(affinity.initial())) else {
            return Ok(Self { before: None });
        };
        let cpus = cpu_set(list, INITIAL)?;
        let before = sched_getaffinity(None).map_err(|e| refused(INITIAL, list, e))?;
        sched_setaffinity(None, &cpus).map_err(|e| refused(INITIAL, list, e))?;
        Ok(Self { before: Some(before) })
    }

    /// Moves the agent back.
    pub fn leave(self) {
        if let Some(before) = self.before {
            // The agent has run there before; where they have gone since, any will do.
            let _ = sched_setaffinity(None, &before);
        }
    }
}

/// Has this process, one more of its container, run on its final CPUs.
pub fn take_final_cpus(affinity: Option<&ExecCPUAffinity>) -> Result<(), SchedulingError> {
    let Some(list) = affinity.and_then(|affinity| listed(affinity.cpu_affinity_final())) else {
        return Ok(());
    };
    sched_setaffinity(None, &cpu_set(list, FINAL)?).map_err(|e| refused(FINAL, list, e))
}

fn listed(list: &Option<String>) -> Option<&str> {
    list.as_deref().filter(|list| !list.is_empty())
}

fn refused(field: &'static str, list: &str, source: rustix::io::Errno) -> SchedulingError {
    SchedulingError::Refused { field, value: format!("CPUs {list}"), source: source.into() }
}

/// Reads a list such as `0-1,3`.
fn cpu_set(list: &str, field: &'static str) -> Result<CpuSet, SchedulingError> {
    let bad = || SchedulingError::Cpus { field, list: list.to_owned() };
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) =
            (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
        if first > last || last >= CpuSet::MAX_CPU {
            return Err(bad());
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheduler_becomes_the_kernel_s_structure() {
        let scheduler: Scheduler = serde_json::from_str(
            r#"{"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RECLAIM", "SCHED_FLAG_KEEP_PARAMS"],
                "runtime": 1, "deadline": 2, "period": 3}"#,
        )
        .unwrap();
        let expected = Attributes {
            size: 56,
            policy: 6,
            flags: 0x12,
            nice: 0,
            priority: 0,
            runtime: 1,
            deadline: 2,
            period: 3,
            least_utilization: 0,
            most_utilization: 0,
        };
        assert_eq!(Attributes::of(&scheduler), expected);
        let batch: Scheduler = serde_json::from_str(r#"{"policy": "SCHED_BATCH", "nice": -5}"#).unwrap();
        assert_eq!((Attributes::of(&batch).policy, Attributes::of(&batch).nice), (3, -5));
    }

    #[test]
    fn class_and_priority_share_a_number() {
        let number = |json: &str| io_priority(&serde_json::from_str(json).unwrap());
        assert_eq!(number(r#"{"class": "IOPRIO_CLASS_RT", "priority": 7}"#), 0x2007);
        assert_eq!(number(r#"{"class": "IOPRIO_CLASS_IDLE", "priority": 0}"#), 0x6000);
    }

    #[test]
    fn lists_of_cpus_are_read_and_bounded() {
        let set = cpu_set("0-1,3", FINAL).unwrap();
        let found: Vec<usize> = (0..8).filter(|cpu| set.is_set(*cpu)).collect();
        assert_eq!(found, [0, 1, 3]);
        for bad in ["", "1-0", "a", "0,", "1024", "0-99999999999999999999", "-1"] {
            let message = cpu_set(bad, FINAL).unwrap_err().to_string();
            assert!(message.starts_with("process.execCPUAffinity.final: "), "{bad}: {message}");
        }
    }
}
