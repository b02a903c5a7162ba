//! The log: standard error, for warnings, with a limit.
//!
//! Some warnings are about what a guest does, which it can do as often as it likes.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Instant;

use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

use crate::output_limit::{Bounds, OutputLimit, Verdict};

const BOUNDS: Bounds = Bounds { total: 1 << 20, per_second: 16 << 10 };

/// Starts the log. `SANDBOX_LOG` names another level than `warn`.
pub fn start() {
    let level = std::env::var("SANDBOX_LOG").ok().and_then(|level| level.parse().ok());
    tracing_subscriber::fmt()
        .with_writer(LimitedStderr(Mutex::new(OutputLimit::new(BOUNDS, Instant::now()))))
        .with_max_level(level.unwrap_or(Level::WARN))
        .with_ansi(false)
        .without_time()
        .init();
}

struct LimitedStderr(Mutex<OutputLimit>);

/// Writes one event; the subscriber hands over whole events.
struct Event<'a>(&'a Mutex<OutputLimit>);

impl<'a> MakeWriter<'a> for LimitedStderr {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event(&self.0)
    }
}

impl Write for Event<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let mut limit = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut stderr = io::stderr().lock();
        match limit.admit(event.len() as u64, Instant::now()) {
            Verdict::Drop => {}
            Verdict::Write => stderr.write_all(event)?,
            Verdict::WriteAfterGap(bytes) => {
                writeln!(stderr, "[{bytes} bytes of the log dropped]")?;
                stderr.write_all(event)?;
            }
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
