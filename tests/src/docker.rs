//! The real Docker with the shipped `sandbox` as its runtime.
//!
//! Each [`Docker`] is a daemon of its own, over a containerd of its own: one that runs on the host already is never
//! touched. Both are ended when it is dropped, and then nothing of them may be left on the host.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
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

/// The image that every [`Docker`] has: busybox and the probe.
pub const IMAGE: &str = "busybox";

/// How long the daemons may take to end.
const END_TIME: Duration = Duration::from_secs(20);

/// A Docker of the test's own.
pub struct Docker {
    id: String,
    directory: TempDir,
    /// In the order in which they are ended: dockerd, containerd.
    daemons: Vec<Process>,
    /// The network namespace that takes the host's place; none: containers have no network.
    host: Option<Namespace>,
}

impl Docker {
    /// One for a test, with [`IMAGE`]. `None`, and a notice, where Docker is not installed.
    pub fn new(name: &str) -> Option<Self> {
        Self::with(name, None)
    }

    /// One with Docker's default network, in a namespace that takes the host's place. `None`, and a notice, where that
    /// cannot be had.
    pub fn with_network(name: &str) -> Option<Self> {
        if let Some(why) = cni::missing_for_engines() {
            skip(name, why);
            return None;
        }
        Self::with(name, Some(Namespace::new()))
    }

    fn with(name: &str, host: Option<Namespace>) -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if let Some(missing) =
            ["dockerd", "containerd", "docker"].into_iter().find(|name| !is_installed(name))
        {
            let remedy = "apt-get install --no-install-recommends docker.io";
            skip(name, &format!("{missing} is not installed: {remedy}"));
            return None;
        }
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let id = format!("{name}-{}-{count}", std::process::id());
        let directory = tempfile::Builder::new().prefix("sbt-").tempdir().expect("a temporary directory");
        for name in ["tmp", "client"] {
            std::fs::DirBuilder::new().mode(0o700).create(directory.path().join(name)).expect("a directory");
        }
        let mut docker = Self { id, directory, daemons: vec![], host };
        docker.start_daemons();
        docker.import();
        Some(docker)
    }

    /// The controllers of cgroup version 1 for which Docker reads no statistics of any container, whatever its runtime:
    /// those that have a hierarchy which is mounted nowhere, as one does that a container's systemd mounted and left.
    pub fn controllers_in_its_way() -> Vec<String> {
        let text =
            std::fs::read_to_string("/proc/self/cgroup").expect("the cgroups of a process can be read");
        let controllers = |line: &str| line.split(':').nth(1).map(str::to_owned);
        text.lines()
            .filter_map(controllers)
            .filter(|names| !names.is_empty() && !names.starts_with("name="))
            .filter(|names| !Path::new("/sys/fs/cgroup").join(names).exists())
            .collect()
    }

    fn start_daemons(&mut self) {
        let configuration = self.path("containerd.toml");
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n",
            self.path("containerd-root"),
            self.path("containerd-state"),
            self.path("containerd.sock"),
        );
        std::fs::write(&configuration, text).expect("a file");
        let mut containerd = self.marked("containerd");
        containerd.arg("--config").arg(configuration);
        self.daemons.push(Process::spawn(&mut containerd));
        std::fs::write(self.path("daemon.json"), self.daemon_json()).expect("a file");
        let mut dockerd = self.marked("dockerd");
        dockerd.arg("--config-file").arg(self.path("daemon.json"));
        self.daemons.insert(0, Process::spawn(&mut dockerd));
        let deadline = Instant::now() + patience();
        while self.line("version").code() != Some(0) {
            let [dockerd, containerd] = &mut self.daemons[..] else { panic!("two daemons") };
            let ok = dockerd.running() && containerd.running() && Instant::now() < deadline;
            assert!(ok, "dockerd did not start\n{}\n{}", dockerd.so_far().1, containerd.so_far().1);
            std::thread::sleep(POLL * 10);
        }
    }

    /// The daemon's configuration: nothing of it is the host's, and no interface, address or filter of the host is
    /// touched.
    fn daemon_json(&self) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        let mut configuration = serde_json::json!({
            "containerd": path("containerd.sock"),
            "data-root": path("data"),
            "exec-root": path("exec"),
            "pidfile": path("docker.pid"),
            "hosts": [format!("unix://{}", path("docker.sock"))],
            "userland-proxy": false,
            "ip6tables": false,
            "cgroup-parent": format!("/{}", self.id),
            "group": "root",
            "runtimes": { "sandbox": { "path": binary("sandbox") } },
            "default-runtime": "sandbox",
            "features": { "buildkit": false },
        });
        if self.host.is_none() {
            configuration["bridge"] = "none".into();
            for setting in ["iptables", "ip-forward", "ip-masq"] {
                configuration[setting] = false.into();
            }
        }
        configuration.to_string()
    }

    fn import(&self) {
        let tar = self.path("image.tar");
        Bundle::make(&self.path("bundle")).pack(&tar);
        self.docker(["import".into(), tar.into(), OsString::from(IMAGE)]).expect_code(0);
    }

    /// The network namespace that takes the host's place.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn host(&self) -> &Namespace {
        self.host.as_ref().expect("a Docker with a network")
    }

    /// A file or directory of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `docker` with these words. Waits for it.
    #[track_caller]
    pub fn docker<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Outcome {
        Process::spawn(&mut self.command(words)).wait()
    }

    /// `docker` with the words of a line that are parted by blanks. Waits for it.
    #[track_caller]
    pub fn line(&self, line: &str) -> Outcome {
        self.docker(line.split_whitespace())
    }

    /// `docker run` of [`IMAGE`] with options, parted by blanks, and a shell script. Waits for it.
    #[track_caller]
    pub fn run(&self, options: &str, script: &str) -> Outcome {
        self.docker(self.run_words(options, script))
    }

    /// Starts a container in the background.
    #[track_caller]
    pub fn start(&self, name: &str, options: &str, script: &str) {
        self.docker(self.run_words(&format!("--detach --name {name} {options}"), script)).expect_code(0);
    }

    /// `docker exec` of a shell script. Waits for it.
    #[track_caller]
    pub fn exec(&self, name: &str, script: &str) -> Outcome {
        self.docker(["exec", name, "sh", "-c", script])
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

    /// What `docker inspect` says in this format, without the end of its line.
    #[track_caller]
    pub fn inspect(&self, name: &str, format: &str) -> String {
        self.docker(["inspect", name, "--format", format]).expect_code(0).out().trim_end().to_owned()
    }

    /// Waits until `docker inspect` says this.
    ///
    /// # Panics
    ///
    /// When that takes longer than a program may take at all.
    #[track_caller]
    pub fn wait_for(&self, name: &str, format: &str, value: &str) {
        let deadline = Instant::now() + patience();
        while self.inspect(name, format) != value {
            assert!(
                Instant::now() < deadline,
                "{format} did not become {value}: {}",
                self.inspect(name, format)
            );
            std::thread::sleep(POLL * 10);
        }
    }

    /// `docker` on a terminal.
    pub fn terminal<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Terminal {
        Terminal::spawn(&mut self.command(words), (80, 24))
    }

    fn run_words(&self, options: &str, script: &str) -> Vec<String> {
        let fixed: &[&str] = if self.host.is_some() { &["run"] } else { &["run", "--network", "none"] };
        let words = fixed.iter().copied().chain(options.split_whitespace());
        words.chain([IMAGE, "sh", "-c", script]).map(str::to_owned).collect()
    }

    /// The command line.
    pub fn command<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Command {
        let mut command = self.marked("docker");
        command.args(words.into_iter().map(Into::into));
        command.env("DOCKER_HOST", format!("unix://{}", self.path("docker.sock").display()));
        command.env("DOCKER_CONFIG", self.path("client")).env("DOCKER_BUILDKIT", "0");
        command
    }

    /// A program with the test's mark and what the runtime has to know, which the daemons hand down to it.
    fn marked(&self, program: &str) -> Command {
        let mut command = match &self.host {
            Some(host) => host.command(program),
            None => Command::new(program),
        };
        command.env(MARK, &self.id).env("TMPDIR", self.path("tmp")).env("SANDBOX_MACHINE", machine());
        command.env("SANDBOX_KERNEL", artefact("SANDBOX_KERNEL", "vmlinux"));
        command.env("SANDBOX_IMAGE", artefact("SANDBOX_IMAGE", "guest.img"));
        command
    }

    fn trace(&self) -> Trace {
        Trace { id: self.id.clone(), directory: self.directory.path().to_owned() }
    }

    /// Removes the containers, ends the daemons, and removes the parent cgroup, which Docker leaves.
    fn take_down(&mut self) {
        let containers = self.line("ps --all --quiet").out();
        let words = ["rm", "--force", "--volumes"].into_iter().chain(containers.split_whitespace());
        if !containers.is_empty() {
            let _ = self.command(words).output();
        }
        for mut daemon in self.daemons.drain(..) {
            daemon.signal(Signal::SIGTERM);
            let deadline = Instant::now() + END_TIME;
            while daemon.running() && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
        }
        for cgroup in leaks::cgroups_named(&self.id) {
            let _ = std::fs::remove_dir(cgroup);
        }
    }
}

fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.take_down();
        if std::thread::panicking() {
            leaks::kill_all(&self.trace());
        } else {
            leaks::expect_none(&self.trace());
            let states = self.path("exec").join("runtime-runc/moby");
            let left = std::fs::read_dir(states).into_iter().flatten().flatten().map(|entry| entry.path());
            assert_eq!(left.collect::<Vec<_>>(), [] as [PathBuf; 0], "state of containers was left");
        }
    }
}
