//! The verbs of engines: `create`, and what follows it.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::orphan::{Orphan, become_subreaper};
use crate::place::patience;
use crate::process::{POLL, Process};
use crate::{Outcome, Sandbox};

/// A container that was created. It has to be deleted before its sandbox is dropped.
pub struct Container<'a> {
    sandbox: &'a Sandbox,
    /// `sandbox create`, which has ended: its streams are the container's.
    pub streams: Process,
    /// The process that stands for it on the host.
    pub monitor: Orphan,
}

impl Sandbox {
    /// Replaces the command of the configuration.
    pub fn command<A: Into<String>>(self, args: impl IntoIterator<Item = A>) -> Self {
        let args: Vec<String> = args.into_iter().map(Into::into).collect();
        self.config(|config| config["process"]["args"] = json!(args))
    }

    /// The command line of `sandbox create`.
    pub fn create_command(&self) -> Command {
        become_subreaper();
        let mut command = self.base_command();
        command.arg("create").args(self.making()).arg("--bundle").arg(self.bundle.path());
        command.arg("--pid-file").arg(self.pid_file()).arg(&self.id);
        command
    }

    /// Where [`Sandbox::create`] has the process id written to.
    pub fn pid_file(&self) -> PathBuf {
        self.directory().join("pid")
    }

    /// `sandbox create`, which has to work.
    #[track_caller]
    pub fn create(&self) -> Container<'_> {
        let mut streams = Process::spawn(&mut self.create_command());
        streams.wait_alone().expect_code(0);
        Container { sandbox: self, streams, monitor: orphan_in(&self.pid_file()) }
    }

    /// `sandbox create` and `sandbox start`.
    #[track_caller]
    pub fn start(&self) -> Container<'_> {
        let container = self.create();
        self.on("start", []).expect_stdout("");
        container
    }

    /// `sandbox create`, which is to fail.
    #[track_caller]
    pub fn create_in_vain(&self) -> Outcome {
        Process::spawn(&mut self.create_command()).wait()
    }

    /// A verb on this sandbox, its id before the other words. Waits for it.
    #[track_caller]
    pub fn on<const N: usize>(&self, verb: &str, words: [&str; N]) -> Outcome {
        self.verb([verb, &self.id].into_iter().chain(words))
    }

    /// The command line of `sandbox exec` with these options and command.
    pub fn exec_command<A: Into<OsString>>(
        &self,
        options: &[&str],
        command: impl IntoIterator<Item = A>,
    ) -> Command {
        become_subreaper();
        let mut exec = self.base_command();
        exec.arg("exec").args(options).arg(&self.id).args(command.into_iter().map(Into::into));
        exec
    }

    /// `sandbox exec`. Waits for it.
    #[track_caller]
    pub fn exec<const N: usize>(&self, options: &[&str], command: [&str; N]) -> Outcome {
        Process::spawn(&mut self.exec_command(options, command)).wait()
    }

    /// The command line of `sandbox update` with these words, for those who write to its standard input.
    pub fn update_command(&self, words: &[&str]) -> Command {
        self.verb_command(["update"].into_iter().chain(words.iter().copied()).chain([self.id.as_str()]))
    }

    /// What `sandbox state` prints.
    #[track_caller]
    pub fn shown(&self) -> Value {
        let outcome = self.on("state", []).expect_code(0);
        serde_json::from_slice(&outcome.stdout).unwrap_or_else(|e| panic!("{e}\n{outcome}"))
    }

    /// What `sandbox state` says it is doing.
    #[track_caller]
    pub fn status(&self) -> String {
        self.shown()["status"].as_str().expect("a status is text").to_owned()
    }

    /// Waits until `sandbox state` says that.
    #[track_caller]
    pub fn wait_for_status(&self, status: &str) {
        let deadline = Instant::now() + patience();
        while self.status() != status {
            assert!(Instant::now() < deadline, "the container did not become {status}: {}", self.shown());
            std::thread::sleep(POLL);
        }
    }
}

impl Container<'_> {
    /// Kills it, waits for its end and deletes it.
    #[track_caller]
    pub fn end(self) {
        self.sandbox.on("kill", ["KILL"]).expect_code(0);
        assert_eq!(self.monitor.wait(), 128 + Signal::SIGKILL as i32);
        self.sandbox.on("delete", []).expect_stdout("");
    }

    /// Waits until its standard output has `text` in it.
    #[track_caller]
    pub fn wait_for_stdout(&mut self, text: &str) {
        let deadline = Instant::now() + patience();
        while !self.streams.so_far().0.contains(text) {
            assert!(Instant::now() < deadline, "{text:?} did not appear: {:?}", self.streams.so_far());
            std::thread::sleep(POLL);
        }
    }
}

/// The process whose id is in a file.
///
/// # Panics
///
/// When there is none.
#[track_caller]
pub fn orphan_in(file: &std::path::Path) -> Orphan {
    let text = fs::read_to_string(file).expect("the process id was written");
    Orphan::of(text.parse().unwrap_or_else(|e| panic!("{e}: {text:?}")))
}
