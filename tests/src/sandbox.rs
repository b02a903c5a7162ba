//! A sandbox under test: a bundle, a private state directory, and `sandbox run`.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bundle::Bundle;
use crate::leaks::{self, Trace};
use crate::place::{binary, machine};
use crate::process::Process;
use crate::terminal::Terminal;
use crate::{Outcome, place};

/// The environment variable by which processes of a test are found.
pub const MARK: &str = "SANDBOX_TEST_MARK";

/// A new sandbox named after `name`, with a bundle of its own.
pub fn sandbox(name: &str) -> Sandbox {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let id = format!("{name}-{}-{count}", std::process::id());
    let directory = tempfile::Builder::new().prefix("sbt-").tempdir().expect("a temporary directory");
    for name in ["state", "tmp"] {
        std::fs::DirBuilder::new().mode(0o700).create(directory.path().join(name)).expect("a directory");
    }
    let bundle = Bundle::make(&directory.path().join("bundle"));
    Sandbox {
        id,
        bundle,
        state: directory.path().join("state"),
        directory,
        machine: machine(),
        globals: vec![],
        options: vec![],
        env: vec![],
        stdin: vec![],
    }
}

/// A sandbox under test. Dropping it checks that nothing of it is left on the host.
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: Bundle,
    directory: TempDir,
    state: PathBuf,
    machine: String,
    globals: Vec<OsString>,
    options: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    stdin: Vec<u8>,
}

impl Sandbox {
    /// Adds an option of `sandbox run` with a value.
    pub fn option(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.options.extend([name.into(), value.into()]);
        self
    }

    /// Adds an option of `sandbox run` without a value.
    pub fn flag(mut self, name: &str) -> Self {
        self.options.push(name.into());
        self
    }

    /// Adds a word before `run`.
    pub fn global(mut self, word: impl Into<OsString>) -> Self {
        self.globals.push(word.into());
        self
    }

    /// Sets an environment variable of the runtime.
    pub fn host_env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Asks for this machine instead of the one under test.
    pub fn machine(mut self, machine: &str) -> Self {
        self.machine = machine.into();
        self
    }

    /// What the next run reads from its standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Changes config.json.
    pub fn config(self, change: impl FnOnce(&mut Value)) -> Self {
        let mut config = self.bundle.config();
        change(&mut config);
        self.bundle.write(&config);
        self
    }

    /// Gives the process these capabilities, in every set that makes them usable.
    pub fn capable(self, capabilities: &[&str]) -> Self {
        self.config(|config| {
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = capabilities.into();
            }
        })
    }

    /// The container's cgroups are its own to change.
    pub fn writable_cgroups(self) -> Self {
        self.config(|config| {
            let mounts = config["mounts"].as_array_mut().expect("a list");
            for mount in mounts.iter_mut().filter(|mount| mount["destination"] == "/sys/fs/cgroup") {
                mount["options"] = json!(["nosuid", "noexec", "nodev"]);
            }
        })
    }

    /// Adds a mount.
    pub fn mount(self, destination: &str, kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Self {
        let source = source.as_ref();
        let mount = json!({"destination": destination, "type": kind, "source": source, "options": options});
        self.config(|config| config["mounts"].as_array_mut().expect("an array").push(mount))
    }

    /// A directory of the test that goes away with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The private state directory, `--root`.
    pub fn state(&self) -> PathBuf {
        self.state.clone()
    }

    /// Takes another state directory, below the one that it has.
    pub fn deep_state(mut self, path: &str) -> Self {
        self.state.push(path);
        self
    }

    /// `sandbox run` of the bundle with `args` in place of its command, none: the bundle's own. Waits for it.
    #[track_caller]
    pub fn run<A: Into<OsString>>(&self, args: impl IntoIterator<Item = A>) -> Outcome {
        let mut process = Process::spawn(&mut self.run_command(self.bundle.path(), args));
        process.feed(self.stdin.clone());
        process.wait_with_stdin_open()
    }

    /// `sandbox run` of another bundle. Waits for it.
    #[track_caller]
    pub fn run_bundle(&self, bundle: &Path) -> Outcome {
        Process::spawn(&mut self.run_command(bundle, NO_ARGS)).wait()
    }

    /// Starts `sandbox run` with `args` in place of the bundle's command.
    pub fn spawn<A: Into<OsString>>(&self, args: impl IntoIterator<Item = A>) -> Process {
        Process::spawn(&mut self.run_command(self.bundle.path(), args))
    }

    /// Starts `sandbox run` on a terminal of that many columns and rows.
    pub fn terminal<A: Into<OsString>>(
        &self,
        size: (u16, u16),
        args: impl IntoIterator<Item = A>,
    ) -> Terminal {
        Terminal::spawn(&mut self.run_command(self.bundle.path(), args), size)
    }

    /// `sandbox` with this sandbox's `--root` and other words. Waits for it.
    #[track_caller]
    pub fn verb<A: Into<OsString>>(&self, words: impl IntoIterator<Item = A>) -> Outcome {
        Process::spawn(&mut self.verb_command(words)).wait()
    }

    /// The command line of [`Sandbox::verb`].
    pub fn verb_command<A: Into<OsString>>(&self, words: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.base_command();
        command.args(words.into_iter().map(Into::into));
        command
    }

    /// The command line of [`Sandbox::run`].
    pub fn run_command<A: Into<OsString>>(
        &self,
        bundle: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = self.base_command();
        command.args(&self.globals).args(["run", "--id", &self.id, "--machine", &self.machine]);
        command.args(&self.options).arg(bundle);
        let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        if !args.is_empty() {
            command.arg("--").args(args);
        }
        command
    }

    /// `sandbox` with this sandbox's `--root`, environment and mark.
    pub(crate) fn base_command(&self) -> Command {
        let mut command = Command::new(binary("sandbox"));
        command.arg("--root").arg(self.state());
        command.env(MARK, &self.id).env("TMPDIR", self.directory.path().join("tmp"));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The words of `create` and `run` that were asked for, but the bundle and the id.
    pub(crate) fn making(&self) -> Vec<OsString> {
        ["--machine".into(), self.machine.clone().into()].into_iter().chain(self.options.clone()).collect()
    }

    /// What this sandbox leaves on a host while it is there.
    pub fn trace(&self) -> Trace {
        Trace { id: self.id.clone(), directory: self.directory.path().to_owned() }
    }

    /// Waits until nothing of it is left on the host.
    ///
    /// # Panics
    ///
    /// When something is left for good; says what.
    #[track_caller]
    pub fn expect_nothing_left(&self) -> &Self {
        leaks::expect_none(&self.trace());
        self
    }

    /// Checks that nothing is left, and that the same id works again with a sound bundle and sound options.
    #[track_caller]
    pub fn expect_clean_and_usable(&self) {
        self.expect_nothing_left();
        let bundle = Bundle::make(&self.directory.path().join("sound-bundle"));
        let mut command = self.base_command();
        command.env_clear().env("PATH", place::SEARCH_PATH).env(MARK, &self.id);
        command.args(["run", "--id", &self.id, "--machine", &machine()]).arg(bundle.path());
        command.args(["--", "echo", "again"]);
        for variable in ["SANDBOX_KERNEL", "SANDBOX_IMAGE"] {
            if let Some(value) = std::env::var_os(variable) {
                command.env(variable, value);
            }
        }
        Process::spawn(&mut command).wait().expect_stdout("again\n");
        std::fs::remove_dir_all(bundle.path()).expect("the bundle can be removed");
    }
}

/// No arguments: the bundle's own command.
pub const NO_ARGS: [&str; 0] = [];

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            leaks::kill_all(&self.trace());
        } else {
            leaks::expect_none(&self.trace());
        }
    }
}
