//! Hooks of a container's configuration as gates: a start does not get past one that is closed, which is how a test comes to
//! a step of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use crate::place::patience;
use crate::process::{POLL, Process};

/// The points at which hooks of the host run, in their order.
const ON_THE_HOST: [&str; 4] = ["createRuntime", "createContainer", "poststart", "poststop"];

/// The point at which hooks of the guest run, before the process does.
const IN_THE_GUEST: &str = "startContainer";

/// What a hook does: it says that it is there, and waits until it may go on.
const HOOK: &str = r#"echo >"$1/reached-$2"; while [ -e "$1/closed-$2" ]; do sleep 0.05; done"#;

/// The gates of one container at a time.
pub struct Gates(PathBuf);

impl Gates {
    /// Gates that are open. They are files in a directory, which is made.
    pub fn make(directory: &Path) -> Self {
        fs::create_dir(directory).expect("a directory");
        Self(directory.into())
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// The hooks for a configuration; in the guest too, if it has the directory in this place.
    pub fn hooks(&self, guest: Option<&str>) -> Value {
        let hook = |directory: &str, point: &str| {
            json!([{
                "path": "/bin/sh",
                "args": ["sh", "-c", HOOK, "hook", directory, point],
                "env": ["PATH=/bin:/usr/bin"],
            }])
        };
        let directory = self.0.display().to_string();
        let mut hooks: serde_json::Map<String, Value> =
            ON_THE_HOST.map(|point| (point.to_owned(), hook(&directory, point))).into_iter().collect();
        if let Some(guest) = guest {
            hooks.insert(IN_THE_GUEST.into(), hook(guest, IN_THE_GUEST));
        }
        hooks.into()
    }

    fn file(&self, what: &str, point: &str) -> PathBuf {
        self.0.join(format!("{what}-{point}"))
    }

    /// Closes the gate at a point. Nobody has come to it yet.
    pub fn close(&self, point: &str) {
        let _ = fs::remove_file(self.file("reached", point));
        fs::write(self.file("closed", point), "").expect("a file");
    }

    /// Opens it, for whoever waits there or comes later.
    pub fn open(&self, point: &str) {
        fs::remove_file(self.file("closed", point)).expect("it is closed");
    }

    /// Whether a start has come to it.
    pub fn is_reached(&self, point: &str) -> bool {
        self.file("reached", point).exists()
    }

    /// Waits until the container that a program starts has come to it.
    ///
    /// # Panics
    ///
    /// When that takes longer than anything may take, or the program ends first.
    #[track_caller]
    pub fn wait_at(&self, point: &str, starter: &mut Process) {
        let deadline = Instant::now() + patience();
        while !self.is_reached(point) {
            if !starter.running() || Instant::now() > deadline {
                let (out, err) = starter.so_far();
                panic!("no start has come to {point}: {out}{err}");
            }
            std::thread::sleep(POLL);
        }
    }
}
