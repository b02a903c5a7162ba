//! The real Podman with the shipped `sandbox` as its runtime.
//!
//! Each [`Podman`] has its storage, state and cgroups to itself. They are taken down when it is dropped, and then
//! nothing of it may be left on the host.

use std::ffi::OsString;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use tempfile::TempDir;

use crate::Outcome;
use crate::bundle::Bundle;
use crate::cni;
use crate::leaks::{self, Trace};
use crate::network::Namespace;
use crate::place::{artefact, binary, machine, patience, skip};
use crate::process::{POLL, Process};
use crate::sandbox::MARK;
use crate::terminal::Terminal;

/// The image that every [`Podman`] has: busybox and the probe.
pub const IMAGE: &str = "localhost/busybox";

/// Where Debian has the programs by which Podman makes networks, if not by CNI's plugins.
const NETWORK_PROGRAMS: &str = "/usr/lib/podman";

/// The program that Podman takes for its runtime.
const RUNTIME: &str = "runtime";

/// A Podman of the test's own.
pub struct Podman {
    id: String,
    directory: TempDir,
    /// The network namespace that takes the host's place; none: containers have no network.
    host: Option<Namespace>,
    /// What makes its networks, where it has any.
    networks: Networks,
}

/// What makes a Podman's networks.
#[derive(Clone, Copy, PartialEq)]
enum Networks {
    /// CNI's plugins, in the networks that the host has configured.
    Cni,
    /// netavark, and aardvark-dns for names, in networks of the test's own.
    Netavark,
}

impl Podman {
    /// One for a test, with [`IMAGE`]. `None`, and a notice, where Podman is not installed.
    pub fn new(name: &str) -> Option<Self> {
        Self::with(name, None, Networks::Cni)
    }

    /// One with Podman's default network, in a namespace that takes the host's place. `None`, and a notice, where that
    /// cannot be had.
    pub fn with_network(name: &str) -> Option<Self> {
        if let Some(why) = cni::missing_for_engines() {
            skip(name, why);
            return None;
        }
        Self::with(name, Some(Namespace::new()), Networks::Cni)
    }

    /// The same with networks of its own, whose containers know each other by name.
    pub fn with_names(name: &str) -> Option<Self> {
        let programs = ["netavark", "aardvark-dns"];
        if programs.iter().any(|program| !Path::new(NETWORK_PROGRAMS).join(program).exists()) {
            skip(name, "Podman has no names: apt-get install netavark aardvark-dns");
            return None;
        }
        if let Some(why) = cni::missing_for_engines() {
            skip(name, why);
            return None;
        }
        Self::with(name, Some(Namespace::new()), Networks::Netavark)
    }

    fn with(name: &str, host: Option<Namespace>, networks: Networks) -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if !is_installed() {
            skip(name, "Podman is not installed: apt-get install --no-install-recommends podman");
            return None;
        }
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let id = format!("{name}-{}-{count}", std::process::id());
        let directory = tempfile::Builder::new().prefix("sbt-").tempdir().expect("a temporary directory");
        for name in ["state", "tmp"] {
            std::fs::DirBuilder::new().mode(0o700).create(directory.path().join(name)).expect("a directory");
        }
        let podman = Self { id, directory, host, networks };
        podman.choose_networks();
        podman.write_runtime();
        podman.import();
        Some(podman)
    }

    /// Podman looks here before it chooses by what is installed.
    fn choose_networks(&self) {
        if self.host.is_none() {
            return;
        }
        let choice = match self.networks {
            Networks::Cni => "cni",
            Networks::Netavark => "netavark",
        };
        let storage = self.path("storage");
        std::fs::create_dir(&storage).expect("a directory");
        std::fs::write(storage.join("defaultNetworkBackend"), choice).expect("a file");
    }

    /// Podman's own clean-up does not hand `--runtime-flag` on, and conmon not the environment, so that the state
    /// directory and the variables have to be written down.
    fn write_runtime(&self) {
        let (program, state) = (binary("sandbox"), self.path("state"));
        let (kernel, image) = (artefact("SANDBOX_KERNEL", "vmlinux"), artefact("SANDBOX_IMAGE", "guest.img"));
        let text = format!(
            "#!/bin/sh\nexport {MARK}={} SANDBOX_MACHINE={} SANDBOX_KERNEL={} SANDBOX_IMAGE={}\n\
             exec {} --root {} \"$@\"\n",
            self.id,
            machine(),
            kernel.display(),
            image.display(),
            program.display(),
            state.display()
        );
        std::fs::write(self.path(RUNTIME), text).expect("a file");
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(self.path(RUNTIME), executable).expect("a mode");
    }

    fn import(&self) {
        // All Podmans of a host share the memory of their locks. One that looks while another makes it takes it for broken.
        static LOCKS: Once = Once::new();
        LOCKS.call_once(|| drop(self.command(["info"]).output()));
        let tar = self.path("image.tar");
        Bundle::make(&self.path("bundle")).pack(&tar);
        self.podman(["import".into(), "--quiet".into(), tar.into(), OsString::from(IMAGE)]).expect_code(0);
    }

    /// The network namespace that takes the host's place.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn host(&self) -> &Namespace {
        self.host.as_ref().expect("a Podman with a network")
    }

    /// A file or directory of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `podman` with these words. Waits for it.
    #[track_caller]
    pub fn podman<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Outcome {
        Process::spawn(&mut self.command(words)).wait()
    }

    /// `podman` with the words of a line that are parted by blanks. Waits for it.
    #[track_caller]
    pub fn line(&self, line: &str) -> Outcome {
        self.podman(line.split_whitespace())
    }

    /// `podman run` of [`IMAGE`] with options, parted by blanks, and a shell script. Waits for it.
    #[track_caller]
    pub fn run(&self, options: &str, script: &str) -> Outcome {
        self.podman(self.run_words(options, script))
    }

    /// `podman run` with options, an image and a program, all parted by blanks. Waits for it.
    #[track_caller]
    pub fn run_words_of(&self, line: &str) -> Outcome {
        // Without a parent of its own, Podman leaves a cgroup that belongs to nobody.
        let cgroup = format!("/{}", self.id);
        let words = ["run", "--cgroup-parent", &cgroup].into_iter().chain(line.split_whitespace());
        self.podman(words)
    }

    /// Starts a container in the background.
    #[track_caller]
    pub fn start(&self, name: &str, options: &str, script: &str) {
        self.podman(self.run_words(&format!("--detach --name {name} {options}"), script)).expect_code(0);
    }

    /// Starts a container of another image in the background, with the command that the image has.
    #[track_caller]
    pub fn start_image(&self, name: &str, options: &str, image: &str) {
        let cgroup = format!("/{}", self.id);
        let fixed = ["run", "--network", "none", "--cgroup-parent", &cgroup, "--detach", "--name", name];
        let words = fixed.into_iter().chain(options.split_whitespace()).chain([image]);
        self.podman(words).expect_code(0);
    }

    /// `podman exec` of a shell script. Waits for it.
    #[track_caller]
    pub fn exec(&self, name: &str, script: &str) -> Outcome {
        self.podman(["exec", name, "sh", "-c", script])
    }

    /// Waits until the log of a container has a text in it.
    ///
    /// # Panics
    ///
    /// When that takes longer than a program may take at all.
    #[track_caller]
    pub fn wait_for_log(&self, name: &str, text: &str) {
        let mut following = Process::spawn(&mut self.command(["logs", "--follow", name]));
        following.wait_for_stdout(text);
    }

    /// `podman` on a terminal.
    pub fn terminal<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Terminal {
        Terminal::spawn(&mut self.command(words), (80, 24))
    }

    fn run_words(&self, options: &str, script: &str) -> Vec<String> {
        let cgroup = format!("/{}", self.id);
        let network: &[&str] = if self.host.is_some() { &[] } else { &["--network", "none"] };
        let fixed = ["run", "--cgroup-parent", &cgroup].into_iter().chain(network.iter().copied());
        let words = fixed.chain(options.split_whitespace()).chain([IMAGE, "sh", "-c", script]);
        words.map(str::to_owned).collect()
    }

    /// The command line.
    pub fn command<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Command {
        let mut command = match &self.host {
            Some(host) => host.command("podman"),
            None => Command::new("podman"),
        };
        for (option, name) in [("--root", "storage"), ("--runroot", "run"), ("--tmpdir", "libpod")] {
            command.arg(option).arg(self.path(name));
        }
        command.args([
            "--storage-driver",
            "overlay",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
        ]);
        if self.networks == Networks::Netavark {
            command.arg("--network-config-dir").arg(self.path("networks"));
        }
        command.arg("--runtime").arg(self.path(RUNTIME));
        command.args(words.into_iter().map(Into::into));
        command.env(MARK, &self.id).env("TMPDIR", self.path("tmp"));
        command
    }

    /// Removes a container that runs. Where users are mapped, Podman 4.3 now and then finds the container's `/dev/shm`
    /// busy, with runc as often as with us, and removes the container when it is asked again.
    ///
    /// # Panics
    ///
    /// When the container stays, or cannot be removed for another reason.
    #[track_caller]
    pub fn remove(&self, name: &str) {
        let deadline = Instant::now() + patience();
        loop {
            let outcome = self.line(&format!("rm --force --time 0 {name}"));
            if outcome.code() == Some(0) {
                return;
            }
            let busy = outcome.err().contains("userdata/shm: device or resource busy");
            assert!(busy && Instant::now() < deadline, "{outcome}");
        }
    }

    fn trace(&self) -> Trace {
        Trace { id: self.id.clone(), directory: self.directory.path().to_owned() }
    }

    /// Removes the containers, and what Podman itself keeps: its mount of the storage, and the parent cgroup.
    fn take_down(&self) {
        let _ = self.command(["rm", "--all", "--force", "--time", "0"]).output();
        wait_for_clean_ups(&self.trace());
        for name in ["storage/overlay", "storage"] {
            // It is mounted by the first command that uses it, or not at all; by two at once, it is mounted twice.
            while nix::mount::umount2(&self.path(name), nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        }
        for cgroup in leaks::cgroups_named(&self.id) {
            remove_empty(&cgroup);
        }
    }
}

/// Waits, for a bounded time, until no process of the test is left: conmon starts a `podman container cleanup` of its
/// own when a container ends, which mounts the storage again. One that stays is for the check of leaks to name.
fn wait_for_clean_ups(trace: &Trace) {
    let deadline = Instant::now() + patience();
    while !leaks::processes(trace).is_empty() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
}

/// Removes the parent of the containers' cgroups and that of their conmons, which Podman leaves.
fn remove_empty(parent: &Path) {
    // The last conmon may not have ended yet. What is not empty then is for the check of leaks to say.
    let deadline = Instant::now() + patience();
    while parent.exists() && Instant::now() < deadline {
        let _ = std::fs::remove_dir(parent.join("conmon"));
        let _ = std::fs::remove_dir(parent);
        std::thread::sleep(POLL);
    }
}

fn is_installed() -> bool {
    Command::new("podman").arg("--version").output().is_ok_and(|output| output.status.success())
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.take_down();
        if std::thread::panicking() {
            leaks::kill_all(&self.trace());
        } else {
            leaks::expect_none(&self.trace());
        }
    }
}
