//! The kernel's log, which is the only place a guest can write to that outlives it.

use std::fs::OpenOptions;
use std::io::Write;

/// Writes a line to the kernel's log, or to standard error where there is none.
///
/// Failing to log is not an error: there is nowhere left to report it.
pub fn log(line: &str) {
    let written =
        OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut f| f.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
