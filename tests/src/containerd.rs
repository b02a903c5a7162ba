//! The real containerd with the shipped `containerd-shim-sandbox-v2` as a runtime, and `ctr` to drive it.
//!
//! Each [`Containerd`] is a daemon of its own, with its directories, sockets and state to itself. It is taken down when
//! it is dropped, and then nothing of it may be left on the host.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Outcome;
use crate::bundle::Bundle;
use crate::leaks::{self, Trace};
use crate::place::{SEARCH_PATH, artefact, binary, machine, patience, skip};
use crate::process::{POLL, Process};
use crate::sandbox::MARK;
use crate::terminal::Terminal;

/// The image that every [`Containerd`] has: busybox and the probe.
pub const IMAGE: &str = "localhost/busybox:latest";

/// The image of a pod's first container: the same, but it sleeps.
pub const PAUSE: &str = "localhost/pause:latest";

/// The same with a user of its own, by number.
pub const USER: &str = "localhost/user:latest";

/// The same with a user that it does not know.
pub const STRANGER: &str = "localhost/stranger:latest";

/// The part of the configuration of one without Kubernetes.
const NO_CRI: &str =
    "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n";

/// The guest's files, and the variables of the environment that name them.
const ARTEFACTS: [(&str, &str); 2] = [("vmlinux", "SANDBOX_KERNEL"), ("guest.img", "SANDBOX_IMAGE")];

/// The name of the shipped shim's program.
pub const SHIM: &str = "containerd-shim-sandbox-v2";

/// A containerd of the test's own.
pub struct Containerd {
    id: String,
    namespace: String,
    directory: TempDir,
    daemon: Option<Process>,
}

impl Containerd {
    /// One for a test, with [`IMAGE`]. `None`, and a notice, where containerd is not installed.
    pub fn new(name: &str) -> Option<Self> {
        Self::configured(name, None, |_, _| NO_CRI.to_owned())
    }

    /// One that gives up on a shim's clean-up, and kills it, when that has taken this long. `None`: see [`Self::new`].
    pub fn impatient(name: &str, limit: &str) -> Option<Self> {
        let limits = format!("[timeouts]\n\"io.containerd.timeout.shim.cleanup\" = {limit:?}\n");
        Self::configured(name, None, |_, _| format!("{NO_CRI}{limits}"))
    }

    /// One whose snapshotter `blockfile` makes root file systems that are images. `None`, and a notice, where it has none.
    pub fn with_images(name: &str) -> Option<Self> {
        let section = |directory: &Path| {
            let (root, scratch) = (directory.join("images"), directory.join("scratch"));
            let make = fs::File::create(&scratch).and_then(|file| file.set_len(16 << 20));
            make.expect("a file");
            let format = Command::new("mkfs.ext4").arg("-q").arg(&scratch).status();
            assert!(format.is_ok_and(|status| status.success()), "mkfs.ext4 makes no file system");
            format!(
                "{NO_CRI}[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nroot_path = {root:?}\n\
                 scratch_file = {scratch:?}\nfs_type = \"ext4\"\nmount_options = [\"loop\"]\n"
            )
        };
        let containerd = Self::configured(name, None, |_, directory| section(directory))?;
        let plugins = containerd.line("plugins ls").expect_code(0).out();
        if !plugins.lines().any(|line| line.contains("blockfile") && line.trim_end().ends_with("ok")) {
            skip(name, "this containerd has no snapshotter `blockfile`, which came with 1.7");
            return None;
        }
        Some(containerd)
    }

    /// One in whose configuration there is what `rest` says, which is given the test's id and directory. Its images and
    /// containers are in this namespace; without one, in one that is named after the test.
    pub(crate) fn configured(
        name: &str,
        namespace: Option<&str>,
        rest: impl FnOnce(&str, &Path) -> String,
    ) -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if !is_installed() {
            skip(name, "containerd is not installed: apt-get install --no-install-recommends containerd");
            return None;
        }
        let id = format!("{name}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let directory = tempfile::Builder::new().prefix("sbt-").tempdir().expect("a temporary directory");
        for name in ["state", "tmp"] {
            fs::DirBuilder::new().mode(0o700).create(directory.path().join(name)).expect("a directory");
        }
        for (file, variable) in ARTEFACTS {
            symlink(artefact(variable, file), directory.path().join(file)).expect("a link");
        }
        let namespace = namespace.unwrap_or(&id).to_owned();
        let rest = rest(&id, directory.path());
        let mut containerd = Self { id, namespace, directory, daemon: None };
        fs::write(containerd.path("config.toml"), containerd.configuration(&rest)).expect("a file");
        containerd.operator("");
        containerd.start();
        containerd.import();
        Some(containerd)
    }

    fn configuration(&self, rest: &str) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        let (root, state, socket, events) = (path("root"), path("run"), path("sock"), path("sock.ttrpc"));
        format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n{rest}\n\
             [grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {events:?}\n"
        )
    }

    /// Starts the daemon, and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        let programs = binary(SHIM).parent().expect("a program has a directory").to_owned();
        let mut command = Command::new(program("containerd"));
        command.arg("--config").arg(self.path("config.toml"));
        command.env("PATH", format!("{}:{SEARCH_PATH}", programs.display()));
        command.env(MARK, &self.id).env("TMPDIR", self.path("tmp"));
        command.env("SANDBOX_ROOT", self.path("state")).env("SANDBOX_MACHINE", machine());
        command.env("SANDBOX_CONFIG", self.path("sandbox.toml"));
        command.envs(ARTEFACTS.map(|(file, variable)| (variable, self.path(file))));
        self.daemon = Some(Process::spawn(&mut command));
        let deadline = Instant::now() + patience();
        while !self
            .command(["version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
        {
            assert!(Instant::now() < deadline, "containerd does not answer: {}", self.log());
            std::thread::sleep(POLL);
        }
    }

    /// Kills the daemon, which has no time to say so to anybody.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.signal(Signal::SIGKILL);
            daemon.wait_alone();
        }
    }

    /// Writes the operator's configuration, which holds for what is made from now on.
    pub fn operator(&self, text: &str) {
        fs::write(self.path("sandbox.toml"), text).expect("a file");
    }

    /// Has another file be the guest's kernel or image, by its name there, while `work` is done.
    pub fn with_artefact<R>(&self, name: &str, other: &Path, work: impl FnOnce() -> R) -> R {
        let (path, kept) = (self.path(name), self.path("kept"));
        fs::rename(&path, &kept).and_then(|()| symlink(other, &path)).expect("a link");
        let done = work();
        fs::rename(&kept, &path).expect("a link");
        done
    }

    /// Waits until the daemon has said a line with all of these words: it passes on what shims say.
    ///
    /// # Panics
    ///
    /// When that takes longer than anything may take.
    #[track_caller]
    pub fn wait_for_log(&self, words: &[&str]) {
        let deadline = Instant::now() + patience();
        while !self.log().lines().any(|line| words.iter().all(|word| line.contains(word))) {
            assert!(Instant::now() < deadline, "nobody has said {words:?}: {}", self.log());
            std::thread::sleep(POLL);
        }
    }

    /// What the daemon has said.
    pub fn log(&self) -> String {
        self.daemon.as_ref().map(|daemon| daemon.so_far().1).unwrap_or_default()
    }

    fn import(&self) {
        let root = Bundle::make(&self.path("bundle")).root("");
        let image = self.path("image");
        fs::create_dir(&image).expect("a directory");
        let tar = |from: &Path, to: &Path, names: &[String]| {
            let mut command = Command::new("tar");
            command.arg("-C").arg(from).arg("-cf").arg(to).args(names);
            Process::spawn(&mut command).wait().expect_code(0);
        };
        tar(&root, &image.join("layer.tar"), &[".".to_owned()]);
        let mut sum = Command::new("sha256sum");
        let sum = Process::spawn(sum.arg(image.join("layer.tar"))).wait().expect_code(0).out();
        let digest = format!("sha256:{}", sum.split(' ').next().unwrap_or_default());
        let (mut manifest, mut names) =
            (Vec::new(), vec!["manifest.json".to_owned(), "layer.tar".to_owned()]);
        for (tag, command, user) in [
            (IMAGE, "sh", ""),
            (PAUSE, "sleep 1000000", ""),
            (USER, "sh", "1000"),
            (STRANGER, "sh", "stranger"),
        ] {
            let name = format!("{}.json", names.len());
            let command: Vec<&str> = command.split(' ').collect();
            let config = json!({
                "architecture": "amd64",
                "os": "linux",
                "config": {"Env": ["PATH=/bin"], "Cmd": command, "User": user},
                "rootfs": {"type": "layers", "diff_ids": [digest]},
            });
            fs::write(image.join(&name), config.to_string()).expect("a file");
            manifest.push(json!({"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}));
            names.push(name);
        }
        fs::write(image.join("manifest.json"), json!(manifest).to_string()).expect("a file");
        tar(&image, &self.path("image.tar"), &names);
        let archive = self.path("image.tar").into_os_string();
        self.ctr(["image".into(), "import".into(), archive]).expect_code(0);
    }

    /// A file or directory of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The test's id, which is unique on the host.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The namespace in which the test's containers are.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The command line of `ctr` with these words.
    pub fn command<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Command {
        let mut command = Command::new(program("ctr"));
        command.arg("--address").arg(self.path("sock")).args(["--namespace", &self.namespace]);
        command.args(words.into_iter().map(Into::into));
        command.env(MARK, &self.id).env("TMPDIR", self.path("tmp"));
        command
    }

    /// `ctr` with these words. Waits for it.
    #[track_caller]
    pub fn ctr<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Outcome {
        Process::spawn(&mut self.command(words)).wait()
    }

    /// `ctr` with the words of a line that are parted by blanks. Waits for it.
    #[track_caller]
    pub fn line(&self, line: &str) -> Outcome {
        self.ctr(line.split_whitespace())
    }

    /// The command line of `ctr run` with options, parted by blanks, and a shell script.
    pub fn run_command(&self, name: &str, options: &str, script: &str) -> Command {
        let fixed = ["run", "--runtime", "io.containerd.sandbox.v2"];
        let words =
            fixed.into_iter().chain(options.split_whitespace()).chain([IMAGE, name, "sh", "-c", script]);
        self.command(words)
    }

    /// `ctr run` of a shell script. Waits for it.
    #[track_caller]
    pub fn run(&self, name: &str, options: &str, script: &str) -> Outcome {
        Process::spawn(&mut self.run_command(name, options, script)).wait()
    }

    /// Starts a container in the background.
    #[track_caller]
    pub fn detach(&self, name: &str, script: &str) {
        self.run(name, "--detach --null-io", script).expect_code(0);
    }

    /// `ctr run` on a terminal.
    pub fn terminal(&self, name: &str, options: &str, script: &str) -> Terminal {
        Terminal::spawn(&mut self.run_command(name, options, script), (80, 24))
    }

    /// `ctr task exec` of a shell script. Waits for it.
    #[track_caller]
    pub fn exec(&self, name: &str, exec: &str, script: &str) -> Outcome {
        self.ctr(["task", "exec", "--exec-id", exec, name, "sh", "-c", script])
    }

    /// Its version, such as `1.6.20`.
    #[track_caller]
    pub fn version(&self) -> String {
        let said = self.line("version").expect_code(0).out();
        let word = said.lines().rev().find_map(|line| line.trim().strip_prefix("Version:"));
        word.unwrap_or_default().trim().trim_start_matches('v').to_owned()
    }

    /// How a task is, in the words of `ctr task ls`. `None`: there is no such task.
    #[track_caller]
    pub fn status(&self, name: &str) -> Option<String> {
        let list = self.line("task ls").expect_code(0).out();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(name))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// Waits until a task is so.
    ///
    /// # Panics
    ///
    /// When that takes longer than anything may take.
    #[track_caller]
    pub fn wait_for_status(&self, name: &str, status: Option<&str>) {
        let deadline = Instant::now() + patience();
        while self.status(name).as_deref() != status {
            assert!(Instant::now() < deadline, "{name} did not become {status:?}: {}", self.log());
            std::thread::sleep(POLL);
        }
    }

    /// Removes a stopped task and its container. The process has to have ended with this code.
    #[track_caller]
    pub fn remove(&self, name: &str, code: i32) {
        let outcome = self.line(&format!("task rm {name}")).expect_code(0);
        let said = outcome.err().contains(&format!("exit code {code}\""));
        assert_eq!(said, code != 0, "{outcome}");
        self.line(&format!("container rm {name}")).expect_code(0);
    }

    /// Kills a container's process, waits for its end and removes the container.
    #[track_caller]
    pub fn end(&self, name: &str) {
        self.line(&format!("task kill --signal KILL {name}")).expect_code(0);
        self.wait_for_status(name, Some("STOPPED"));
        self.remove(name, 128 + Signal::SIGKILL as i32);
    }

    /// The processes of the test that run a program with this word in their command line.
    pub fn processes(&self, word: &str) -> Vec<Pid> {
        let all = leaks::processes(&self.trace());
        all.into_iter().filter(|(_, command)| command.contains(word)).map(|(pid, _)| pid).collect()
    }

    /// The shims that serve.
    pub fn shims(&self) -> Vec<Pid> {
        let all = leaks::processes(&self.trace());
        let serves = |command: &str| command.starts_with(SHIM) && command.trim_end().ends_with(" serve");
        all.into_iter().filter(|(_, command)| serves(command)).map(|(pid, _)| pid).collect()
    }

    /// Waits until nothing of any container is left but what the daemon itself knows: no process, no mount, no cgroup, no
    /// state.
    ///
    /// # Panics
    ///
    /// When something still is after a while.
    #[track_caller]
    pub fn expect_no_sandbox(&self) {
        self.wait_until_gone(|| {
            let state = fs::read_dir(self.path("state")).into_iter().flatten().flatten();
            let cgroups = leaks::cgroups_named(&self.id).into_iter().flat_map(|all| {
                let below = fs::read_dir(all).into_iter().flatten().flatten();
                below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            });
            let run = self.path("run").display().to_string();
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let mounts = mounts.lines().filter(|line| line.contains(&run)).map(str::to_owned);
            let entries = state.chain(cgroups).map(|entry| entry.path().display().to_string());
            entries.chain(mounts).collect()
        });
    }

    /// Waits until no process of any container is left: a machine ends a little after the shim that was killed.
    ///
    /// # Panics
    ///
    /// When one still is after a while.
    #[track_caller]
    pub fn expect_no_process(&self) {
        self.wait_until_gone(Vec::new);
    }

    #[track_caller]
    fn wait_until_gone(&self, besides: impl Fn() -> Vec<String>) {
        let deadline = Instant::now() + patience();
        loop {
            let mut left = besides();
            for word in [SHIM, "/proc/self/exe", "sandbox-vmm", "qemu-system"] {
                left.extend(self.processes(word).iter().map(|pid| format!("{word} {pid}")));
            }
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "something is left: {}\n{}", left.join("\n"), self.log());
            std::thread::sleep(POLL);
        }
    }

    fn trace(&self) -> Trace {
        Trace { id: self.id.clone(), directory: self.directory.path().to_owned() }
    }

    /// Removes the containers, ends the daemon, and removes the namespace's cgroup, which containerd leaves.
    fn take_down(&mut self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        for kind in ["task", "container"] {
            let names = self.line(&format!("{kind} ls --quiet")).out();
            let names: Vec<&str> = names.split_whitespace().collect();
            for name in names {
                let force = if kind == "task" { " --force" } else { "" };
                self.line(&format!("{kind} rm{force} {name}"));
            }
        }
        daemon.signal(Signal::SIGTERM);
        daemon.wait_alone();
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([root.to_owned()]) {
            let _ = fs::remove_dir(hierarchy.join(&self.id));
        }
    }
}

/// A program of containerd's: from the directory that `SANDBOX_CONTAINERD_DIR` names, or else the installed one.
fn program(name: &str) -> PathBuf {
    std::env::var_os("SANDBOX_CONTAINERD_DIR").map_or_else(|| name.into(), |dir| Path::new(&dir).join(name))
}

fn is_installed() -> bool {
    Command::new(program("containerd")).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The configuration that its clients start from.
pub(crate) fn starting_spec() -> Value {
    let spec = Command::new(program("ctr")).args(["oci", "spec"]).output().expect("`ctr` can be started");
    serde_json::from_slice(&spec.stdout).expect("`ctr oci spec` gives JSON")
}

/// Whether its shims can make pods themselves: version 2 or later.
pub(crate) fn has_sandbox_api() -> bool {
    let version = Command::new(program("containerd")).arg("--version").output();
    let version =
        version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let number = version.split_whitespace().nth(2).unwrap_or_default().trim_start_matches('v');
    number.split('.').next().and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major >= 2)
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.take_down();
        if std::thread::panicking() {
            leaks::kill_all(&self.trace());
        } else {
            leaks::expect_none(&self.trace());
        }
    }
}
