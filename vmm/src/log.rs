//! The log: standard error, for warnings, with a limit.
//!
//! Some warnings are about what a guest does, which it can do as often as it likes.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Instant;

use tracing::{Level, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::output_limit::{Bounds, OutputLimit, Verdict};

const BOUNDS: Bounds = Bounds { total: 1 << 20, per_second: 16 << 10 };

/// Starts the log. `SANDBOX_LOG` names another level than `warn`.
pub fn start() {
    let level = std::env::var("SANDBOX_LOG").ok().and_then(|level| level.parse().ok());
    let limit = OutputLimit::new(BOUNDS, Instant::now());
    subscriber(Limited::new(limit, io::stderr()), level.unwrap_or(Level::WARN)).init();
}

fn subscriber(to: Limited<impl Write + Send + 'static>, level: Level) -> impl Subscriber + Send + Sync {
    tracing_subscriber::fmt().with_writer(to).with_max_level(level).with_ansi(false).without_time().finish()
}

/// Where events go, and how much of them may.
struct Limited<W>(Mutex<(OutputLimit, W)>);

impl<W> Limited<W> {
    fn new(limit: OutputLimit, to: W) -> Self {
        Self(Mutex::new((limit, to)))
    }
}

/// Writes one event; the subscriber hands over whole events.
struct Event<'a, W>(&'a Limited<W>);

impl<'a, W: Write + 'a> MakeWriter<'a> for Limited<W> {
    type Writer = Event<'a, W>;

    fn make_writer(&'a self) -> Event<'a, W> {
        Event(self)
    }
}

impl<W: Write> Write for Event<'_, W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let Event(Limited(limited)) = self;
        let (limit, to) = &mut *limited.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match limit.admit(event.len() as u64, Instant::now()) {
            Verdict::Drop => {}
            Verdict::Write => to.write_all(event)?,
            Verdict::WriteAfterGap(bytes) => {
                writeln!(to, "[{bytes} bytes of the log dropped]")?;
                to.write_all(event)?;
            }
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::output_limit::Counts;

    /// Keeps what is written.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written of so many warnings, after those that `limit` knows of.
    fn logged(limit: OutputLimit, warnings: usize) -> String {
        let kept = Kept::default();
        let subscriber = subscriber(Limited::new(limit, kept.clone()), Level::WARN);
        tracing::subscriber::with_default(subscriber, || {
            (0..warnings).for_each(|_| tracing::warn!("vsock: a ring is broken"));
        });
        let bytes = kept.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn warnings_that_a_guest_causes_over_and_over_are_bounded() {
        const WARNINGS: usize = 10_000;
        let bounds = Bounds { total: 4 << 10, ..BOUNDS };
        let log = logged(OutputLimit::new(bounds, Instant::now()), WARNINGS);
        let written: usize =
            log.lines().filter(|line| !line.starts_with('[')).map(|line| line.len() + 1).sum();
        assert!(log.contains("a ring is broken") && written as u64 <= bounds.total, "{written} bytes: {log}");
    }

    #[test]
    fn what_was_dropped_is_told_before_the_next_warning() {
        let mut limit = OutputLimit::new(BOUNDS, Instant::now());
        assert_eq!(limit.admit(BOUNDS.total + 1, Instant::now()), Verdict::Drop);
        assert_eq!(limit.counts(), Counts { written: 0, dropped: BOUNDS.total + 1 });
        let log = logged(limit, 1);
        let gap = format!("[{} bytes of the log dropped]\n", BOUNDS.total + 1);
        assert!(log.starts_with(&gap) && log.contains("a ring is broken"), "{log}");
    }
}
