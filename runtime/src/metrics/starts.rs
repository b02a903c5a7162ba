//! How starts of machines went, in a file that all who start one update in turn.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use sandbox_vmm_api::MachineKind;
use serde::{Deserialize, Serialize};

use super::text::{Metric, Text};
use crate::replace::replace;

/// The file, in the directory that the operator names.
const FILE: &str = "starts.json";

/// The most bytes of it that are read.
const MAX_BYTES: u64 = 64 << 10;

/// The upper ends of the histogram's buckets, in seconds.
const BOUNDS: [f64; 11] = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

/// How long somebody else may take with the file before a start goes uncounted.
const LOCK_TIME: Duration = Duration::from_secs(1);

const LOCK_POLL: Duration = Duration::from_millis(2);

const FAILURES: Metric = Metric {
    name: "sandbox_start_failures_total",
    kind: "counter",
    help: "Sandboxes that were to be made and could not.",
};

const SECONDS: Metric = Metric {
    name: "sandbox_start_seconds",
    kind: "histogram",
    help: "Time from the request for a sandbox until its first container stands.",
};

/// What has been counted.
#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
struct Starts {
    failures: u64,
    machines: BTreeMap<String, Histogram>,
}

/// How long starts on one kind of machine took.
#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
struct Histogram {
    /// Those that took no longer than each of [`BOUNDS`], and longer than the one before.
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum_seconds: f64,
}

impl Histogram {
    fn add(&mut self, seconds: f64) {
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket] += 1;
        }
        self.count += 1;
        self.sum_seconds += seconds;
    }
}

/// A start that is counted, as a failure unless it is said to stand.
#[derive(Debug)]
pub struct Attempt {
    directory: Option<PathBuf>,
    begin: Instant,
    machine: Option<MachineKind>,
    stands: bool,
}

impl Attempt {
    /// One that begins now. It is counted in this directory; in none: not at all.
    pub fn begin(directory: Option<&Path>) -> Self {
        Self { directory: directory.map(Path::to_owned), begin: Instant::now(), machine: None, stands: false }
    }

    /// It runs on this machine.
    pub fn on(&mut self, machine: MachineKind) {
        self.machine = Some(machine);
    }

    /// Its first container stands.
    pub fn stands(&mut self) {
        if !std::mem::replace(&mut self.stands, true) {
            let seconds = self.begin.elapsed().as_secs_f64();
            let machine = self.machine.map_or("unknown", MachineKind::name);
            self.count(|starts| starts.machines.entry(machine.into()).or_default().add(seconds));
        }
    }

    /// A start that cannot be counted is a start all the same.
    fn count(&self, change: impl FnOnce(&mut Starts)) {
        if let Some(directory) = &self.directory {
            let _ = update(directory, change);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.stands {
            self.count(|starts| starts.failures += 1);
        }
    }
}

/// Changes the file. One that makes no sense is begun anew, as counters may.
fn update(directory: &Path, change: impl FnOnce(&mut Starts)) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let lock = File::open(directory)?;
    let deadline = Instant::now() + LOCK_TIME;
    while let Err(error) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK || Instant::now() > deadline {
            return Err(error.into());
        }
        std::thread::sleep(LOCK_POLL);
    }
    let mut starts = read(directory);
    change(&mut starts);
    let file = directory.join(FILE);
    replace(&file, &file.with_extension("new"), &serde_json::to_vec(&starts)?)
}

fn read(directory: &Path) -> Starts {
    let read = || {
        let path = directory.join(FILE);
        let length = fs::metadata(&path).ok()?.len();
        serde_json::from_slice(&fs::read(&path).ok().filter(|_| length <= MAX_BYTES)?).ok()
    };
    read().unwrap_or_default()
}

/// Writes what has been counted.
pub fn write(directory: &Path, text: &mut Text) {
    let starts = read(directory);
    text.add(FAILURES, &[], starts.failures as f64);
    for (machine, histogram) in &starts.machines {
        let machine = machine.as_str();
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(histogram.buckets) {
            below += count;
            let bound = bound.to_string();
            text.add_as(SECONDS, "_bucket", &[("machine", machine), ("le", bound.as_str())], below as f64);
        }
        text.add_as(SECONDS, "_bucket", &[("machine", machine), ("le", "+Inf")], histogram.count as f64);
        text.add_as(SECONDS, "_sum", &[("machine", machine)], histogram.sum_seconds);
        text.add_as(SECONDS, "_count", &[("machine", machine)], histogram.count as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_counted_by_how_they_end() {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("metrics");
        drop(Attempt::begin(Some(&directory)));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut attempt = Attempt::begin(Some(&directory));
                    attempt.on(MachineKind::Kvm);
                    attempt.stands();
                    attempt.stands();
                });
            }
        });
        let starts = read(&directory);
        assert_eq!((starts.failures, starts.machines["kvm"].count), (1, 8));
        assert_eq!(starts.machines["kvm"].buckets.iter().sum::<u64>(), 8);
        drop(Attempt::begin(None));

        fs::write(directory.join(FILE), "damaged").unwrap();
        drop(Attempt::begin(Some(&directory)));
        assert_eq!(read(&directory), Starts { failures: 1, ..Starts::default() });
    }

    #[test]
    fn buckets_are_cumulative() {
        let directory = tempfile::tempdir().unwrap();
        update(directory.path(), |starts| {
            for seconds in [0.05, 0.07, 100.0] {
                starts.machines.entry("kvm".into()).or_default().add(seconds);
            }
        })
        .unwrap();
        let mut text = Text::default();
        write(directory.path(), &mut text);
        let text = text.finish();
        for line in [
            "sandbox_start_failures_total 0",
            "sandbox_start_seconds_bucket{machine=\"kvm\",le=\"0.05\"} 1",
            "sandbox_start_seconds_bucket{machine=\"kvm\",le=\"60\"} 2",
            "sandbox_start_seconds_bucket{machine=\"kvm\",le=\"+Inf\"} 3",
            "sandbox_start_seconds_count{machine=\"kvm\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
