//! What a container uses, in containerd's words: the metrics of version 2 of cgroups, which the guest has whatever the
//! host has.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use sandbox_protocol::Stats;

/// The metrics of a container.
pub fn metrics(stats: &Stats) -> Metrics {
    Metrics {
        pids: Some(PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit.unwrap_or(0),
            ..PidsStat::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: stats.cpu.usage_micros,
            user_usec: stats.cpu.user_micros,
            system_usec: stats.cpu.system_micros,
            nr_periods: stats.cpu.periods,
            nr_throttled: stats.cpu.throttled_periods,
            throttled_usec: stats.cpu.throttled_micros,
            ..CPUStat::default()
        })
        .into(),
        memory: Some(memory(stats)).into(),
        memory_events: Some(MemoryEvents {
            low: stats.memory.events.low,
            high: stats.memory.events.high,
            max: stats.memory.events.max,
            oom: stats.memory.events.oom,
            oom_kill: stats.memory.events.oom_kill,
            ..MemoryEvents::default()
        })
        .into(),
        io: Some(IOStat { usage: stats.io.iter().map(io).collect(), ..IOStat::default() }).into(),
        hugetlb: stats.hugetlb.iter().map(hugetlb).collect(),
        ..Metrics::default()
    }
}

/// A working set is what is in use less what is inactive of files: the reader of these numbers subtracts.
fn memory(stats: &Stats) -> MemoryStat {
    let memory = &stats.memory;
    let of = |name: &str| memory.stat.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: memory.current_bytes,
        usage_limit: memory.limit_bytes.unwrap_or(u64::MAX),
        swap_usage: memory.swap_current_bytes,
        swap_limit: memory.swap_limit_bytes.unwrap_or(u64::MAX),
        max_usage: memory.peak_bytes,
        swap_max_usage: memory.swap_peak_bytes,
        ..MemoryStat::default()
    }
}

fn io(entry: &sandbox_protocol::IoStats) -> IOEntry {
    IOEntry {
        major: entry.major.into(),
        minor: entry.minor.into(),
        rbytes: entry.read_bytes,
        wbytes: entry.written_bytes,
        rios: entry.reads,
        wios: entry.writes,
        ..IOEntry::default()
    }
}

fn hugetlb(entry: &sandbox_protocol::HugetlbStats) -> HugeTlbStat {
    HugeTlbStat {
        current: entry.current_bytes,
        max: entry.limit_bytes.unwrap_or(u64::MAX),
        pagesize: entry.page_size.clone(),
        failcnt: entry.limit_hits,
        ..HugeTlbStat::default()
    }
}
