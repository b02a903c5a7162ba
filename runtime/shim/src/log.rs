//! The shim's own messages. containerd reads them from a fifo in the bundle of the container that the shim was
//! started for, and writes them to its own log.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};
use sandbox_runtime::state::rfc3339;

use crate::RUNTIME;

/// The fifo, in the bundle.
const FIFO: &str = "log";

static LOG: OnceLock<Log> = OnceLock::new();

/// Where messages go, and what each of them says besides.
#[derive(Debug)]
struct Log {
    fifo: File,
    about: String,
}

/// Opens the log of the shim of a pod, if there is one in the working directory.
///
/// Both ends of the fifo are ours, and nothing waits: a containerd that does not read, or is gone for a while, costs
/// messages and nothing else.
pub fn open(namespace: &str, pod: &str) {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if let Ok(fifo) = rustix::fs::open(FIFO, flags, Mode::empty()) {
        let _ =
            LOG.set(Log { fifo: File::from(fifo), about: format!("namespace={namespace} sandbox={pod}") });
    }
}

/// Writes an error, of a container or of the pod.
pub fn error(container: Option<&str>, message: &str) {
    write("error", container, message);
}

/// Writes something good to know.
pub fn info(container: Option<&str>, message: &str) {
    write("info", container, message);
}

fn write(level: &str, container: Option<&str>, message: &str) {
    let Some(log) = LOG.get() else { return };
    let line = line(level, &log.about, container, message, &rfc3339(SystemTime::now()));
    // A fifo that is full has no reader.
    let _ = (&log.fifo).write_all(line.as_bytes());
}

fn line(level: &str, about: &str, container: Option<&str>, message: &str, time: &str) -> String {
    let container = container.map(|id| format!(" container={id}")).unwrap_or_default();
    let message = serde_json::Value::from(message);
    format!("time=\"{time}\" level={level} msg={message} runtime={RUNTIME} {about}{container}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_whose_it_is() {
        let text = line("info", "namespace=k8s.io sandbox=pod", Some("one"), "it \"stands\"", "now");
        let expected = "time=\"now\" level=info msg=\"it \\\"stands\\\"\" runtime=io.containerd.sandbox.v2 \
                        namespace=k8s.io sandbox=pod container=one\n";
        assert_eq!(text, expected);
        assert!(!line("error", "", None, "x", "now").contains("container="));
    }
}
