//! Where the time of a start went.

use std::time::Instant;

use sandbox_vmm_api::Timing;

/// Steps in the order in which they ended.
#[derive(Debug)]
pub struct Timeline {
    last: Instant,
    steps: Vec<Timing>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { last: Instant::now(), steps: Vec::new() }
    }
}

impl Timeline {
    /// What was done since the last step, or since the start, was this.
    pub fn step(&mut self, name: &str) {
        let now = Instant::now();
        let micros = u64::try_from(now.duration_since(self.last).as_micros()).unwrap_or(u64::MAX);
        self.steps.push(Timing { step: name.to_owned(), micros });
        self.last = now;
    }

    /// All steps.
    pub fn into_timings(self) -> Vec<Timing> {
        self.steps
    }
}
