//! What a container uses, as the kernel counts it for the container's cgroup.
//!
//! The numbers are those of the kernel's `Documentation/admin-guide/cgroup-v2.rst`, the name of the file is with
//! each. A counter that the guest's kernel does not have is 0; a limit of `None` is no limit.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a container uses, and its limits.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// CPU time.
    pub cpu: CpuStats,
    /// Memory and swap.
    pub memory: MemoryStats,
    /// Processes and threads.
    pub pids: PidsStats,
    /// Input and output, one entry for each device.
    pub io: Vec<IoStats>,
    /// Huge pages, one entry for each size of page that the kernel counts.
    pub hugetlb: Vec<HugetlbStats>,
}

/// `cpu.stat`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct CpuStats {
    /// CPU time used, in microseconds (`usage_usec`).
    pub usage_micros: u64,
    /// Of it, in user mode (`user_usec`).
    pub user_micros: u64,
    /// Of it, in the kernel (`system_usec`).
    pub system_micros: u64,
    /// Periods of the bandwidth limit that have passed (`nr_periods`).
    pub periods: u64,
    /// Of them, those in which the limit was met (`nr_throttled`).
    pub throttled_periods: u64,
    /// The time for which the limit held processes back, in microseconds (`throttled_usec`).
    pub throttled_micros: u64,
}

/// `memory.*`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct MemoryStats {
    /// Memory in use, in bytes (`memory.current`).
    pub current_bytes: u64,
    /// The most that it has been, in bytes (`memory.peak`).
    pub peak_bytes: u64,
    /// The limit, in bytes (`memory.max`).
    pub limit_bytes: Option<u64>,
    /// Swap in use, in bytes (`memory.swap.current`).
    pub swap_current_bytes: u64,
    /// The most that it has been, in bytes (`memory.swap.peak`).
    pub swap_peak_bytes: u64,
    /// The limit of swap alone, in bytes (`memory.swap.max`).
    pub swap_limit_bytes: Option<u64>,
    /// What memory is used for, by the kernel's own names: bytes, pages or events (`memory.stat`).
    pub stat: BTreeMap<String, u64>,
    /// How often limits were met.
    pub events: MemoryEvents,
}

/// `memory.events`, each a count of events in the container and below it.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct MemoryEvents {
    /// Memory was taken in spite of the reservation (`low`).
    pub low: u64,
    /// The high mark was passed (`high`).
    pub high: u64,
    /// The limit was about to be passed (`max`).
    pub max: u64,
    /// An allocation was about to fail at the limit (`oom`).
    pub oom: u64,
    /// A process was killed for lack of memory (`oom_kill`).
    pub oom_kill: u64,
}

/// `pids.*`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct PidsStats {
    /// Processes and threads (`pids.current`).
    pub current: u64,
    /// The limit (`pids.max`).
    pub limit: Option<u64>,
}

/// A line of `io.stat`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct IoStats {
    /// The device's major number in the guest.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
    /// Bytes read (`rbytes`).
    pub read_bytes: u64,
    /// Bytes written (`wbytes`).
    pub written_bytes: u64,
    /// Reads (`rios`).
    pub reads: u64,
    /// Writes (`wios`).
    pub writes: u64,
}

/// `hugetlb.<page size>.*`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct HugetlbStats {
    /// The size of a page, as the kernel names it: `2MB` or `1GB`.
    pub page_size: String,
    /// Memory in such pages, in bytes (`current`).
    pub current_bytes: u64,
    /// The limit, in bytes (`max`).
    pub limit_bytes: Option<u64>,
    /// How often the limit was met (`max` of `events`).
    pub limit_hits: u64,
}
