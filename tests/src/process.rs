//! A program under test with pipes for its streams, and a deadline.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::Outcome;
use crate::place::patience;

/// How often a condition is looked at while waiting for it.
pub const POLL: Duration = Duration::from_millis(10);

/// A running program, in a process group of its own. It is killed when this is dropped.
pub struct Process {
    child: Child,
    command: String,
    stdin: Option<ChildStdin>,
    stdout: Collector,
    stderr: Collector,
}

impl Process {
    /// Starts it with pipes as streams.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let shown = format!("{command:?}");
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
        let stdout = Collector::new(child.stdout.take().expect("stdout is a pipe"));
        let stderr = Collector::new(child.stderr.take().expect("stderr is a pipe"));
        let stdin = child.stdin.take();
        Self { child, command: shown, stdin, stdout, stderr }
    }

    /// The host process's id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Writes to its standard input and leaves it open.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("the program reads its standard input");
    }

    /// Writes all of `bytes` from a thread and closes standard input. A program that does not read is fine.
    pub fn feed(&mut self, bytes: Vec<u8>) {
        let mut stdin = self.stdin.take().expect("standard input is open");
        // Not waited for: it ends at the latest when the program does, and a program may end without reading.
        std::thread::spawn(move || drop(stdin.write_all(&bytes)));
    }

    /// Closes standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("the program is still there");
    }

    /// Waits until its standard output has `text` in it.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`], or the program ends first.
    #[track_caller]
    pub fn wait_for_stdout(&mut self, text: &str) {
        let deadline = Instant::now() + patience();
        while !self.stdout.contains(text) {
            let ended = self.child.try_wait().expect("a child can be waited for").is_some();
            // What was written before the end may still be on its way.
            if (ended && self.stdout.finished() && !self.stdout.contains(text)) || Instant::now() > deadline {
                let outcome = self.kill_and_collect();
                panic!("{text:?} did not appear on standard output\n{outcome}");
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether it is still running.
    pub fn running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Waits for the end of the program alone: another one may have its streams.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn wait_alone(&mut self) -> Outcome {
        let deadline = Instant::now() + patience();
        while self.running() {
            if Instant::now() > deadline {
                let outcome = self.kill_and_collect();
                panic!("the program did not end within {:?}\n{outcome}", patience());
            }
            std::thread::sleep(POLL);
        }
        self.collect()
    }

    /// Waits until nobody has its standard output and standard error any more.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn wait_for_end_of_output(&mut self) {
        let deadline = Instant::now() + patience();
        while !(self.stdout.finished() && self.stderr.finished()) {
            assert!(Instant::now() < deadline, "its output is still open\n{}", self.kill_and_collect());
            std::thread::sleep(POLL);
        }
    }

    /// What was written to its standard streams so far.
    pub fn so_far(&self) -> (String, String) {
        let text = |stream: &Collector| String::from_utf8_lossy(&stream.bytes()).into_owned();
        (text(&self.stdout), text(&self.stderr))
    }

    /// Waits for its end with standard input closed.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn wait(mut self) -> Outcome {
        self.close_stdin();
        self.wait_with_stdin_open()
    }

    /// Waits for its end and leaves standard input as it is.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn wait_with_stdin_open(&mut self) -> Outcome {
        let deadline = Instant::now() + patience();
        while self.running() || !self.stdout.finished() || !self.stderr.finished() {
            if Instant::now() > deadline {
                let what = if self.running() { "did not end" } else { "left its streams open" };
                let outcome = self.kill_and_collect();
                panic!("the program {what} within {:?}\n{outcome}", patience());
            }
            std::thread::sleep(POLL);
        }
        self.collect()
    }

    fn kill_and_collect(&mut self) -> Outcome {
        self.kill();
        std::thread::sleep(Duration::from_millis(100));
        self.collect()
    }

    /// Kills it and its process group.
    pub fn kill(&mut self) {
        // It may be gone already.
        let _ = killpg(self.pid(), Signal::SIGKILL);
    }

    fn collect(&mut self) -> Outcome {
        let status = self.child.wait().expect("a child can be waited for");
        let (stdout, stderr) = (self.stdout.bytes(), self.stderr.bytes());
        Outcome { command: self.command.clone(), status, stdout, stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.running() {
            self.kill();
        }
        let _ = self.child.wait();
    }
}

/// A thread that reads a stream to its end.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Collector {
    fn new(mut stream: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = bytes.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                into.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
            }
        });
        Self { bytes, reader }
    }

    fn finished(&self) -> bool {
        self.reader.is_finished()
    }

    fn contains(&self, text: &str) -> bool {
        let bytes = self.bytes.lock().expect("no reader panics");
        bytes.windows(text.len()).any(|w| w == text.as_bytes())
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().expect("no reader panics").clone()
    }
}
