//! A limit on what a device does for its guest: chains and bytes in a second.
//!
//! Each is a bucket that holds what a second allows, fills at that rate, and is full at first. A device that is about to
//! take a chain from a ring asks the bucket of its thread ([`admit`]); an empty one makes every ring look
//! empty ([`super::chain`]), so that devices know nothing of rates. The transport opens the buckets of a device for the
//! time that the device runs ([`Rate::during`]), and runs it again when they have filled somewhat.
//!
//! A chain is admitted before its length is known, so the bytes of one may overdraw the bucket; what is owed is waited
//! for.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use sandbox_vmm_api::RateLimit;

/// How full an empty bucket has to be before the device runs again: it is not to run for each byte.
const PAUSE: Duration = Duration::from_millis(10);

/// Something that a second allows so much of.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_second: u64,
    /// What it holds; below zero, what is owed. In billionths.
    level: i128,
}

const BILLION: i128 = 1_000_000_000;

impl Bucket {
    fn full(per_second: u64) -> Self {
        Self { per_second, level: i128::from(per_second) * BILLION }
    }

    fn fill(&mut self, passed: Duration) {
        let most = i128::from(self.per_second) * BILLION;
        let more = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX / 2).min(BILLION * 3600);
        self.level = (self.level + more * i128::from(self.per_second)).min(most);
    }

    fn is_empty(&self) -> bool {
        self.level < BILLION
    }

    fn spend(&mut self, amount: u64) {
        self.level -= i128::from(amount) * BILLION;
    }

    /// How long until it is worth looking again.
    fn wait(&self) -> Duration {
        let missing = (BILLION - self.level).max(0) / i128::from(self.per_second.max(1));
        Duration::from_nanos(u64::try_from(missing).unwrap_or(u64::MAX)).max(PAUSE)
    }
}

/// The buckets of a device.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    filled: Instant,
    /// Whether a chain was asked for and not admitted.
    refused: bool,
}

impl Rate {
    /// Full buckets.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            operations: limit.operations_per_second.map(|rate| Bucket::full(rate.get())),
            bytes: limit.bytes_per_second.map(|rate| Bucket::full(rate.get())),
            filled: now,
            refused: false,
        }
    }

    /// Lets a device run with these buckets; says how long it has to wait, if they ran empty.
    pub fn during<R>(&mut self, now: Instant, run: impl FnOnce() -> R) -> (R, Option<Duration>) {
        self.fill(now);
        self.refused = false;
        CURRENT.with_borrow_mut(|current| *current = Some(*self));
        let result = run();
        if let Some(rate) = CURRENT.with_borrow_mut(Option::take) {
            *self = rate;
        }
        (result, self.refused.then(|| self.wait()))
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled);
        self.buckets().for_each(|bucket| bucket.fill(passed));
        self.filled = now;
    }

    fn wait(&mut self) -> Duration {
        self.buckets().filter(|bucket| bucket.is_empty()).map(|bucket| bucket.wait()).max().unwrap_or(PAUSE)
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.operations.iter_mut().chain(&mut self.bytes)
    }
}

/// The buckets of a device, and the timer that says when they have filled.
#[derive(Debug)]
pub struct Limiter {
    rate: Rate,
    timer: OwnedFd,
}

impl Limiter {
    /// A limiter, for a device that has a limit.
    pub fn new(limit: RateLimit) -> io::Result<Option<Self>> {
        if limit.is_none() {
            return Ok(None);
        }
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Some(Self { rate: Rate::new(limit, Instant::now()), timer }))
    }

    /// Readable, edge-triggered, when the device is to run again.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Lets a device run within its limit.
    pub fn run<R>(&mut self, run: impl FnOnce() -> R) -> R {
        let (result, wait) = self.rate.during(Instant::now(), run);
        if let Some(wait) = wait {
            let value = Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
                tracing::error!(%error, "a device with a limit cannot be called again");
            }
        }
        result
    }
}

thread_local! {
    /// The buckets of the device that this thread runs now, if it has a limit.
    static CURRENT: RefCell<Option<Rate>> = const { RefCell::new(None) };
}

/// Whether a chain may be taken.
pub fn admit() -> bool {
    CURRENT.with_borrow_mut(|current| {
        let Some(rate) = current else { return true };
        let is_empty = rate.buckets().any(|bucket| bucket.is_empty());
        rate.refused |= is_empty;
        !rate.refused
    })
}

/// A chain was taken.
pub fn spend_operation() {
    CURRENT.with_borrow_mut(|current| {
        if let Some(bucket) = current.as_mut().and_then(|rate| rate.operations.as_mut()) {
            bucket.spend(1);
        }
    });
}

/// A chain was put back.
pub fn return_operation() {
    CURRENT.with_borrow_mut(|current| {
        if let Some(bucket) = current.as_mut().and_then(|rate| rate.operations.as_mut()) {
            bucket.level += BILLION;
        }
    });
}

/// Bytes were read from the guest, or written to it.
pub fn spend_bytes(bytes: u64) {
    CURRENT.with_borrow_mut(|current| {
        if let Some(bucket) = current.as_mut().and_then(|rate| rate.bytes.as_mut()) {
            bucket.spend(bytes);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    fn rate(operations: u64, bytes: u64, now: Instant) -> Rate {
        let limit = RateLimit {
            operations_per_second: NonZeroU64::new(operations),
            bytes_per_second: NonZeroU64::new(bytes),
        };
        Rate::new(limit, now)
    }

    /// Takes chains of so many bytes until none is admitted; gives their number.
    fn take_all(bytes: u64) -> u32 {
        let mut taken = 0;
        while taken < 1000 && admit() {
            spend_operation();
            spend_bytes(bytes);
            taken += 1;
        }
        taken
    }

    #[test]
    fn a_second_allows_so_many_operations() {
        let start = Instant::now();
        let mut rate = rate(100, 0, start);
        let (taken, wait) = rate.during(start, || take_all(1 << 20));
        assert_eq!((taken, wait), (100, Some(PAUSE)));
        let (taken, _) = rate.during(start + Duration::from_millis(500), || take_all(1));
        assert_eq!(taken, 50);
        let (taken, _) = rate.during(start + Duration::from_secs(100), || take_all(1));
        assert_eq!(taken, 100, "what is not used is not saved for ever");
    }

    #[test]
    fn what_was_overdrawn_is_waited_for() {
        let start = Instant::now();
        let mut rate = rate(0, 1000, start);
        let (taken, wait) = rate.during(start, || take_all(3000));
        assert_eq!(taken, 1);
        let wait = wait.unwrap();
        assert!(wait > Duration::from_secs(2) && wait < Duration::from_millis(2002), "{wait:?}");
        let (taken, _) = rate.during(start + Duration::from_secs(1), || take_all(1));
        assert_eq!(taken, 0);
        let (taken, _) = rate.during(start + wait, || take_all(1));
        assert_eq!(taken, 1);
    }

    #[test]
    fn a_device_without_a_limit_has_none() {
        assert_eq!(take_all(1 << 40), 1000);
        let now = Instant::now();
        let (taken, wait) = rate(0, 0, now).during(now, || take_all(1 << 40));
        assert_eq!((taken, wait), (1000, None));
    }

    #[test]
    fn an_operation_that_was_put_back_was_none() {
        let now = Instant::now();
        let (taken, _) = rate(2, 0, now).during(now, || {
            for _ in 0..10 {
                assert!(admit());
                spend_operation();
                return_operation();
            }
            take_all(0)
        });
        assert_eq!(taken, 2);
    }
}
