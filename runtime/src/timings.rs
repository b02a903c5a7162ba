//! Where the milliseconds of a run went.
//!
//! Client and monitor each note the end of every phase on the same clock (`CLOCK_MONOTONIC`, which all processes
//! of the host share), so that the phases of both join without a gap and add up to the total.

use serde::{Deserialize, Serialize};

/// A moment, in microseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Self((time.tv_sec as u64).saturating_mul(1_000_000).saturating_add(time.tv_nsec as u64 / 1000))
    }
}

/// A phase that ended.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// When it was done; it began when the phase before it ended.
    pub end: Moment,
    /// Parts of it, in microseconds, as whoever did them reports.
    pub parts: Vec<(String, u64)>,
}

/// The phases so far.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Timeline {
    start: Moment,
    phases: Vec<Phase>,
}

impl Timeline {
    /// An empty line from `start`.
    pub fn from(start: Moment) -> Self {
        Self { start, phases: Vec::new() }
    }

    /// Notes that the phase `name` ends now.
    pub fn mark(&mut self, name: &str) {
        self.mark_with(name, Vec::new());
    }

    /// Notes that the phase `name` ends now, and what it consisted of.
    pub fn mark_with(&mut self, name: &str, parts: Vec<(String, u64)>) {
        self.phases.push(Phase { name: name.into(), end: Moment::now(), parts });
    }

    /// Puts the phases of another line after the own ones.
    pub fn append(&mut self, later: Self) {
        self.phases.extend(later.phases);
    }

    /// A table with a row per phase, its parts below it, and the total.
    pub fn table(&self) -> String {
        let mut rows = Vec::new();
        let mut begin = self.start;
        for phase in &self.phases {
            rows.push((phase.name.clone(), phase.end.0.saturating_sub(begin.0)));
            rows.extend(phase.parts.iter().map(|(name, micros)| (format!("  of it: {name}"), *micros)));
            begin = phase.end;
        }
        rows.push(("total".into(), begin.0.saturating_sub(self.start.0)));
        let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let row = |(name, micros): &(String, u64)| {
            format!("{name:width$}  {:>9}.{:03} ms\n", micros / 1000, micros % 1000)
        };
        rows.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up_to_the_total_and_parts_do_not_count() {
        let phase = |name: &str, end, parts| Phase { name: name.into(), end: Moment(end), parts };
        let mut line = Timeline { start: Moment(1000), phases: vec![phase("first", 3500, vec![])] };
        line.append(Timeline {
            start: Moment(9999),
            phases: vec![phase("second", 1_003_500, vec![("a part".into(), 40_000)])],
        });
        let expected = [
            "first                    2.500 ms",
            "second                1000.000 ms",
            "  of it: a part         40.000 ms",
            "total                 1002.500 ms",
            "",
        ];
        assert_eq!(line.table(), expected.join("\n"));
    }
}
