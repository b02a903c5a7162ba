//! A limit on output that a guest can cause: so much in all, and so much in a second.
//!
//! What is above either is dropped and counted, and whoever writes says so at the place.

use std::time::{Duration, Instant};

/// How much there may be.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The most bytes in all.
    pub total: u64,
    /// The most bytes in a second.
    pub per_second: u64,
}

/// What has been written and dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes that were let through.
    pub written: u64,
    /// Bytes that were dropped.
    pub dropped: u64,
}

/// What becomes of a piece of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Write it.
    Write,
    /// Write that so many bytes are missing here, then write it.
    WriteAfterGap(u64),
    /// Drop it.
    Drop,
}

/// The limit, with what it has let through so far.
#[derive(Debug)]
pub struct OutputLimit {
    bounds: Bounds,
    counts: Counts,
    gap: u64,
    second: Instant,
    in_second: u64,
}

impl OutputLimit {
    /// A limit that starts now.
    pub fn new(bounds: Bounds, now: Instant) -> Self {
        Self { bounds, counts: Counts::default(), gap: 0, second: now, in_second: 0 }
    }

    /// Decides about the next piece.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> Verdict {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.in_second = 0;
        }
        if self.counts.written + bytes > self.bounds.total || self.in_second + bytes > self.bounds.per_second
        {
            self.counts.dropped += bytes;
            self.gap += bytes;
            return Verdict::Drop;
        }
        self.counts.written += bytes;
        self.in_second += bytes;
        match std::mem::take(&mut self.gap) {
            0 => Verdict::Write,
            gap => Verdict::WriteAfterGap(gap),
        }
    }

    /// What has been let through and dropped.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { total: 1000, per_second: 100 };

    #[test]
    fn a_second_has_its_limit_and_the_gap_is_told() {
        let start = Instant::now();
        let mut limit = OutputLimit::new(BOUNDS, start);
        assert_eq!(limit.admit(100, start), Verdict::Write);
        assert_eq!(limit.admit(7, start), Verdict::Drop);
        assert_eq!(limit.admit(5, start + Duration::from_secs(1)), Verdict::WriteAfterGap(7));
        assert_eq!(limit.admit(5, start + Duration::from_secs(1)), Verdict::Write);
        assert_eq!(limit.counts(), Counts { written: 110, dropped: 7 });
    }

    #[test]
    fn all_of_it_has_its_limit() {
        let start = Instant::now();
        let mut limit = OutputLimit::new(BOUNDS, start);
        for second in 0..100 {
            limit.admit(100, start + Duration::from_secs(second));
        }
        assert_eq!(limit.counts(), Counts { written: 1000, dropped: 9000 });
    }
}
