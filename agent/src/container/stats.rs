//! What a container uses, out of the files of its cgroup.
//!
//! The files' forms are those of the kernel's `Documentation/admin-guide/cgroup-v2.rst`. A file that is missing
//! belongs to a controller that the kernel does not have, and counts as nothing used and no limit.

use std::collections::BTreeMap;
use std::path::Path;

use sandbox_protocol::{CpuStats, HugetlbStats, IoStats, MemoryEvents, MemoryStats, PidsStats, Stats};

use crate::bounded;

/// The most bytes read of a file. The longest, `memory.stat` and `io.stat`, have some thousand; twice this much
/// fits well into a frame.
const MAX_FILE_BYTES: usize = 32 << 10;

/// The most devices reported.
const MAX_DEVICES: usize = 256;

/// The sizes of huge pages on x86-64, as they stand in the files' names.
const PAGE_SIZES: [&str; 2] = ["2MB", "1GB"];

/// Reads what the cgroup in this directory uses.
pub fn read(cgroup: &Path) -> Stats {
    let files = Files(cgroup);
    Stats {
        cpu: files.cpu(),
        memory: files.memory(),
        pids: PidsStats { current: files.number("pids.current"), limit: files.limit("pids.max") },
        io: devices(&files.text("io.stat")),
        hugetlb: PAGE_SIZES.into_iter().filter_map(|size| files.hugetlb(size)).collect(),
    }
}

struct Files<'a>(&'a Path);

impl Files<'_> {
    fn cpu(&self) -> CpuStats {
        let stat = keyed(&self.text("cpu.stat"));
        CpuStats {
            usage_micros: of(&stat, "usage_usec"),
            user_micros: of(&stat, "user_usec"),
            system_micros: of(&stat, "system_usec"),
            periods: of(&stat, "nr_periods"),
            throttled_periods: of(&stat, "nr_throttled"),
            throttled_micros: of(&stat, "throttled_usec"),
        }
    }

    fn memory(&self) -> MemoryStats {
        let events = keyed(&self.text("memory.events"));
        MemoryStats {
            current_bytes: self.number("memory.current"),
            peak_bytes: self.number("memory.peak"),
            limit_bytes: self.limit("memory.max"),
            swap_current_bytes: self.number("memory.swap.current"),
            swap_peak_bytes: self.number("memory.swap.peak"),
            swap_limit_bytes: self.limit("memory.swap.max"),
            stat: keyed(&self.text("memory.stat")),
            events: MemoryEvents {
                low: of(&events, "low"),
                high: of(&events, "high"),
                max: of(&events, "max"),
                oom: of(&events, "oom"),
                oom_kill: of(&events, "oom_kill"),
            },
        }
    }

    fn hugetlb(&self, page_size: &str) -> Option<HugetlbStats> {
        let file = |name: &str| format!("hugetlb.{page_size}.{name}");
        Some(HugetlbStats {
            page_size: page_size.to_owned(),
            current_bytes: number(&self.text(&file("current")))?,
            limit_bytes: self.limit(&file("max")),
            limit_hits: of(&keyed(&self.text(&file("events"))), "max"),
        })
    }

    fn number(&self, file: &str) -> u64 {
        number(&self.text(file)).unwrap_or(0)
    }

    fn limit(&self, file: &str) -> Option<u64> {
        number(&self.text(file))
    }

    fn text(&self, file: &str) -> String {
        bounded::read_text(&self.0.join(file), MAX_FILE_BYTES).unwrap_or_default().text
    }
}

/// The number that a file consists of; `max`, which means no limit, is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A flat-keyed file: a name and a number in each line.
fn keyed(text: &str) -> BTreeMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), number(value)?))
    };
    text.lines().filter_map(pair).collect()
}

fn of(numbers: &BTreeMap<String, u64>, key: &str) -> u64 {
    numbers.get(key).copied().unwrap_or(0)
}

/// `io.stat`, a nested-keyed file: a device and its counters in each line.
fn devices(text: &str) -> Vec<IoStats> {
    text.lines().filter_map(device).take(MAX_DEVICES).collect()
}

fn device(line: &str) -> Option<IoStats> {
    let (numbers, counters) = line.split_once(' ')?;
    let (major, minor) = numbers.split_once(':')?;
    let counters: BTreeMap<String, u64> = counters
        .split(' ')
        .filter_map(|counter| counter.split_once('='))
        .filter_map(|(key, value)| Some((key.to_owned(), number(value)?)))
        .collect();
    Some(IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: of(&counters, "rbytes"),
        written_bytes: of(&counters, "wbytes"),
        reads: of(&counters, "rios"),
        writes: of(&counters, "wios"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn the_files_of_a_cgroup_become_numbers() {
        let directory = cgroup(&[
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\nnr_throttled 3\nthrottled_usec 2\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "8192\n"),
            ("memory.swap.max", "max\n"),
            ("memory.stat", "anon 100\nfile 200\n"),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n"),
            ("pids.current", "7\n"),
            ("pids.max", "max\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "4194304\n"),
            ("hugetlb.2MB.events", "max 9\n"),
        ]);
        let stats = read(directory.path());
        assert_eq!(
            (stats.cpu.usage_micros, stats.cpu.throttled_periods, stats.cpu.throttled_micros),
            (30, 3, 2)
        );
        assert_eq!((stats.memory.current_bytes, stats.memory.limit_bytes), (4096, Some(8192)));
        assert_eq!((stats.memory.swap_limit_bytes, stats.memory.stat["file"]), (None, 200));
        assert_eq!(stats.memory.events, MemoryEvents { low: 0, high: 1, max: 2, oom: 3, oom_kill: 4 });
        assert_eq!(stats.pids, PidsStats { current: 7, limit: None });
        let huge = HugetlbStats {
            page_size: "2MB".into(),
            current_bytes: 2 << 20,
            limit_bytes: Some(4 << 20),
            limit_hits: 9,
        };
        assert_eq!(stats.hugetlb, [huge]);
    }

    #[test]
    fn a_cgroup_without_controllers_uses_nothing() {
        assert_eq!(read(cgroup(&[]).path()), Stats::default());
    }

    #[test]
    fn lines_of_other_forms_are_passed_over() {
        let got =
            devices("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 \n8:1 rbytes=x\nnone\n");
        let all = IoStats { major: 254, minor: 0, read_bytes: 1, written_bytes: 2, reads: 3, writes: 4 };
        let none = |major, minor| IoStats { major, minor, ..IoStats::default() };
        assert_eq!(got, [all, none(254, 16), none(8, 1)]);
        assert_eq!(keyed("a 1\nb\nc -1\nd 18446744073709551616\n"), BTreeMap::from([("a".into(), 1)]));
        assert_eq!(devices(&"8:0 rbytes=1\n".repeat(MAX_DEVICES + 1)).len(), MAX_DEVICES);
    }
}
