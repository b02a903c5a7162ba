//! How fast the guest's time stamp counter runs.
//!
//! Under TCG the guest reads the host's counter. The guest cannot find out its frequency on this board, which
//! has none of the timers that Linux calibrates with; it would do without, with a clock of 4 ms, after waiting
//! for calibrations that fail. So the host measures it and says so on the kernel's command line.

use std::time::{Duration, Instant};

/// How long the measurement takes at least. Reading the clock and the counter together is off by tens of
/// nanoseconds, so this makes some ten millionths.
const MEASURE_FOR: Duration = Duration::from_millis(5);

/// How long reading the two may take. A thread that loses its processor in between takes a time slice of milliseconds,
/// and the guest's clock would run at twice its speed, or half.
const TOGETHER: Duration = Duration::from_micros(5);

/// How often a reading is tried again until it is close enough; then the closest has to do.
const ATTEMPTS: usize = 100;

/// The clock sources of a host whose counter runs steadily.
const STEADY: [&str; 3] = ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page"];

/// A measurement that has begun.
pub struct Measurement {
    start: Reading,
}

/// The counter at a time.
struct Reading {
    at: Instant,
    /// How long clock and counter were read: so far is one off the other at most.
    took: Duration,
    ticks: u64,
}

impl Measurement {
    /// Begins; none on a host whose counter is not steady.
    pub fn start() -> Option<Self> {
        let source =
            std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        let steady = source.is_ok_and(|source| STEADY.contains(&source.trim()));
        steady.then(|| Self { start: Reading::now() })
    }

    /// The frequency in kHz; waits until enough time has passed.
    pub fn finish(self) -> u64 {
        let missing = MEASURE_FOR.saturating_sub(self.start.at.elapsed());
        if !missing.is_zero() {
            std::thread::sleep(missing);
        }
        let end = Reading::now();
        khz(end.ticks.wrapping_sub(self.start.ticks), end.at.duration_since(self.start.at))
    }
}

impl Reading {
    fn now() -> Self {
        let mut best = Self::once();
        for _ in 1..ATTEMPTS {
            if best.took <= TOGETHER {
                break;
            }
            let next = Self::once();
            if next.took < best.took {
                best = next;
            }
        }
        best
    }

    fn once() -> Self {
        let at = Instant::now();
        // SAFETY: reads a counter that every x86-64 has.
        let ticks = unsafe { std::arch::x86_64::_rdtsc() };
        Self { at, took: at.elapsed(), ticks }
    }
}

fn khz(ticks: u64, time: Duration) -> u64 {
    let khz = u128::from(ticks) * 1_000_000 / time.as_nanos().max(1);
    u64::try_from(khz).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_in_a_time_are_a_frequency() {
        assert_eq!(khz(13_000_000, Duration::from_millis(5)), 2_600_000);
        assert_eq!(khz(u64::MAX, Duration::ZERO), u64::MAX);
    }
}
