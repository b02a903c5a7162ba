//! The shim's own messages. containerd reads them from a fifo in the bundle of the container that the shim was
//! started for, and writes them to its own log.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};
use sandbox_runtime::state::rfc3339;

/// The fifo, in the bundle.
const FIFO: &str = "log";

static LOG: OnceLock<File> = OnceLock::new();

/// Opens the log, if there is one in the working directory.
///
/// Both ends of the fifo are ours, and nothing waits: a containerd that does not read, or is gone for a while, costs
/// messages and nothing else.
pub fn open() {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if let Ok(fifo) = rustix::fs::open(FIFO, flags, Mode::empty()) {
        let _ = LOG.set(File::from(fifo));
    }
}

/// Writes an error.
pub fn error(message: &str) {
    write("error", message);
}

/// Writes something good to know.
pub fn info(message: &str) {
    write("info", message);
}

fn write(level: &str, message: &str) {
    let Some(mut log) = LOG.get() else { return };
    let (time, message) = (rfc3339(SystemTime::now()), serde_json::Value::from(message));
    // A fifo that is full has no reader.
    let _ = log.write_all(format!("time=\"{time}\" level={level} msg={message}\n").as_bytes());
}
