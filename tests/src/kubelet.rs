//! What a kubelet does: pods, by the service of the real containerd for Kubernetes.
//!
//! Each [`Kubelet`] has a [`Containerd`] of its own, with the shipped shim behind the handler `sandbox`, and a network for
//! pods by Debian's CNI plugins. It asks through the client in `tests/cri`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cni;
use crate::containerd::{Containerd, IMAGE, PAUSE, STRANGER, USER, has_sandbox_api, starting_spec};
use crate::gates::Gates;
use crate::outcome::Outcome;
use crate::place::{patience, skip};
use crate::process::{POLL, Process};
use crate::sandbox::MARK;

/// The handler of the configuration that the shipped shim is behind.
pub const HANDLER: &str = "sandbox";

/// The same with a configuration of its own, the file `other.toml` of the test.
pub const CONFIGURED: &str = "configured";

/// The same, for which systemd is to make the cgroups.
pub const SYSTEMD: &str = "systemd";

/// The same, whose pods' containers have the hooks of [`Kubelet::gates`].
pub const GATED: &str = "gated";

/// The same with a network that gives pods an address and no interface.
pub const NO_INTERFACE: &str = "no-interface";

/// The same with a network of nothing but loopback.
pub const ONLY_LOOPBACK: &str = "only-loopback";

/// The same by the sandbox API, where containerd has that.
const SANDBOX_API_HANDLER: &str = "sandbox-api";

/// The variable of the environment that names the only tests with pods that run, parted by commas.
const CHOSEN: &str = "SANDBOX_TEST_PODS";

/// Containerd's namespace for Kubernetes.
const NAMESPACE: &str = "k8s.io";

/// States, as the interface numbers them.
pub const POD_READY: u64 = 0;
/// A pod that has ended.
pub const POD_NOT_READY: u64 = 1;
/// A container that runs.
pub const RUNNING: u64 = 1;
/// A container that has ended.
pub const EXITED: u64 = 2;

/// A containerd that serves Kubernetes, and who asks it.
pub struct Kubelet {
    /// The daemon.
    pub containerd: Containerd,
    /// How the start of a container is held, in a pod with the handler [`GATED`].
    pub gates: Gates,
    /// The handler of its pods.
    handler: &'static str,
}

/// A pod.
pub struct Pod {
    /// Its id.
    pub id: String,
    config: Value,
}

impl Kubelet {
    /// One for a test. `None`, and a notice, where that cannot be had.
    pub fn new(name: &str) -> Option<Self> {
        if std::env::var(CHOSEN).is_ok_and(|chosen| !chosen.split(',').any(|one| one == name)) {
            skip(
                name,
                "where pods take minutes, some of the tests stand for all: SANDBOX_TEST_PODS names them",
            );
            return None;
        }
        if !cni::programs().join("ptp").exists() {
            skip(name, "CNI's plugins are not installed: apt-get install containernetworking-plugins");
            return None;
        }
        if !client().exists() {
            skip(name, "tests/cri is not built: scripts/cri-client");
            return None;
        }
        let mut gates = None;
        let containerd = Containerd::configured(name, Some(NAMESPACE), |id, directory| {
            let made = gates.insert(Gates::make(&directory.join("gates")));
            configuration(id, directory, made)
        })?;
        let kubelet = Self { containerd, gates: gates?, handler: HANDLER };
        kubelet.wait_until_it_serves();
        Some(kubelet)
    }

    /// One whose pods are made by the sandbox API. `None`, and a notice, where containerd does not have that either.
    pub fn with_sandbox_api(name: &str) -> Option<Self> {
        if !has_sandbox_api() {
            skip(
                name,
                "containerd has the sandbox API since version 2: scripts/containerd sid, and SANDBOX_CONTAINERD_DIR",
            );
            return None;
        }
        Some(Self { handler: SANDBOX_API_HANDLER, ..Self::new(name)? })
    }

    /// Kills containerd, and starts another one in its place.
    #[track_caller]
    pub fn restart_containerd(&mut self) {
        self.containerd.kill();
        self.containerd.start();
        self.wait_until_it_serves();
    }

    /// The service begins after the daemon answers, and it hears later of an image that was imported.
    #[track_caller]
    fn wait_until_it_serves(&self) {
        let deadline = Instant::now() + patience();
        for image in [IMAGE, PAUSE, USER, STRANGER] {
            while self.ask(["image", image]).out().trim_end().trim_start_matches("null").is_empty() {
                assert!(Instant::now() < deadline, "no {image}: {}", self.containerd.log());
                std::thread::sleep(POLL);
            }
        }
    }

    /// The command line of the client with these words.
    pub fn command<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Command {
        let mut command = Command::new(client());
        command.arg(self.containerd.path("sock")).args(words.into_iter().map(Into::into));
        command.env(MARK, self.containerd.id());
        command
    }

    /// Asks in the words of the client. Waits for it.
    #[track_caller]
    pub fn ask<W: Into<OsString>>(&self, words: impl IntoIterator<Item = W>) -> Outcome {
        Process::spawn(&mut self.command(words)).wait()
    }

    /// Asks in words that have an answer in JSON.
    #[track_caller]
    pub fn json(&self, words: &[&str]) -> Value {
        let outcome = self.ask(words.iter().copied()).expect_code(0);
        serde_json::from_slice(&outcome.stdout).unwrap_or_else(|e| panic!("{e}\n{outcome}"))
    }

    /// Asks until the answer is as it has to be, and returns it.
    ///
    /// # Panics
    ///
    /// When that takes longer than anything may take.
    #[track_caller]
    pub fn wait_for(&self, words: &[&str], is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + patience();
        loop {
            let answer = self.json(words);
            if is_so(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "{words:?}: {answer}\n{}", self.containerd.log());
            std::thread::sleep(POLL);
        }
    }

    /// What the client is told of a pod, with what is said besides.
    pub fn pod_config(&self, name: &str, besides: Value) -> Value {
        let logs = self.containerd.path("logs");
        let cgroup = format!("/{}", self.containerd.id());
        merged(json!({"name": name, "handler": self.handler, "logs": logs, "cgroup": cgroup}), besides)
    }

    /// Makes a pod.
    #[track_caller]
    pub fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, json!({}))
    }

    /// Makes a pod of which something is said besides.
    #[track_caller]
    pub fn pod_with(&self, name: &str, besides: Value) -> Pod {
        let config = self.pod_config(name, besides);
        let made = self.ask(["run-pod", &config.to_string()]);
        assert_eq!(made.code(), Some(0), "{made}\n{}", self.containerd.log());
        Pod { id: made.out().trim().to_owned(), config }
    }

    /// Asks for a container of [`IMAGE`] with a shell script, of which something is said besides.
    pub fn create(&self, pod: &Pod, name: &str, script: &str, besides: Value) -> Outcome {
        Process::spawn(&mut self.create_command(pod, name, script, besides)).wait()
    }

    /// The command line of [`Kubelet::create`].
    pub fn create_command(&self, pod: &Pod, name: &str, script: &str, besides: Value) -> Command {
        let config = json!({"name": name, "image": IMAGE, "command": ["sh", "-c", script]});
        let config = merged(config, besides).to_string();
        self.command(["create", &pod.id, &pod.config.to_string(), &config])
    }

    /// Makes a container of this kind and starts it. Returns its id.
    #[track_caller]
    pub fn start(&self, pod: &Pod, name: &str, script: &str, besides: Value) -> String {
        let made = self.create(pod, name, script, besides);
        assert_eq!(made.code(), Some(0), "{made}\n{}", self.containerd.log());
        let id = made.out().trim().to_owned();
        let started = self.ask(["start", &id]);
        assert_eq!(started.code(), Some(0), "{started}\n{}", self.containerd.log());
        id
    }

    /// Runs a container of this kind to its end. Returns how it was then, and what it has written.
    #[track_caller]
    pub fn run(&self, pod: &Pod, name: &str, script: &str, besides: Value) -> (Value, String) {
        let id = self.start(pod, name, script, besides);
        let status = self.wait_for(&["status", &id], |status| status["state"] == EXITED);
        (status, self.log(name, 0))
    }

    /// Runs a shell script in a container, as a probe does.
    #[track_caller]
    pub fn exec(&self, id: &str, script: &str) -> Outcome {
        self.ask(["exec", id, &patience().as_secs().to_string(), "sh", "-c", script])
    }

    /// The log of a container, without times and the names of streams.
    #[track_caller]
    pub fn log(&self, name: &str, attempt: u32) -> String {
        let path = self.containerd.path("logs").join(format!("{name}.{attempt}.log"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let lines = text.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or(line));
        lines.fold(String::new(), |text, line| text + line + "\n")
    }

    /// Stops a container and removes it.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        self.ask(["stop", id]).expect_code(0);
        self.ask(["remove", id]).expect_code(0);
    }

    /// Stops a pod and removes it, with its containers.
    #[track_caller]
    pub fn end(&self, pod: &Pod) {
        for verb in ["stop-pod", "remove-pod"] {
            let done = self.ask([verb, &pod.id]);
            assert_eq!(done.code(), Some(0), "{done}\n{}", self.containerd.log());
        }
    }
}

/// The first object, with what the second one has.
fn merged(mut one: Value, other: Value) -> Value {
    let (Some(into), Value::Object(from)) = (one.as_object_mut(), other) else { panic!("no objects") };
    into.extend(from);
    one
}

/// The part of the configuration for Kubernetes, with a network of the test's own.
fn configuration(id: &str, directory: &Path, gates: &Gates) -> String {
    let subnet = format!("10.214.{}.0/24", subnet_of(id));
    let addresses = json!({"type": "host-local", "subnet": subnet, "dataDir": directory.join("addresses")});
    let cni = network(directory, id, &json!({"type": "ptp", "ipam": addresses}));
    let bare = network(directory, NO_INTERFACE, &json!({"type": "host-local", "ipam": addresses}));
    let lonely = network(directory, ONLY_LOOPBACK, &json!({"type": "loopback"}));
    let programs = cni::programs();
    let other = directory.join("other.toml");
    let gated = directory.join("gated.json");
    let mut spec = starting_spec();
    spec["hooks"] = gates.hooks(None);
    fs::write(&gated, spec.to_string()).expect("a file");
    let sandbox_api = match has_sandbox_api() {
        true => format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{SANDBOX_API_HANDLER}]\n\
             runtime_type = \"io.containerd.sandbox.v2\"\nsandboxer = \"shim\"\n"
        ),
        false => String::new(),
    };
    format!(
        "disabled_plugins = [\"io.containerd.internal.v1.opt\"]\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         sandbox_image = {PAUSE:?}\nnetns_mounts_under_state_dir = true\nrestrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {programs:?}\nconf_dir = {cni:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{HANDLER}]\n\
         runtime_type = \"io.containerd.sandbox.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{CONFIGURED}]\n\
         runtime_type = \"io.containerd.sandbox.v2\"\npod_annotations = [\"dev.sandbox.*\"]\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{CONFIGURED}.options]\n\
         ConfigPath = {other:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{GATED}]\n\
         runtime_type = \"io.containerd.sandbox.v2\"\nbase_runtime_spec = {gated:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{NO_INTERFACE}]\n\
         runtime_type = \"io.containerd.sandbox.v2\"\ncni_conf_dir = {bare:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{ONLY_LOOPBACK}]\n\
         runtime_type = \"io.containerd.sandbox.v2\"\ncni_conf_dir = {lonely:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{SYSTEMD}]\n\
         runtime_type = \"io.containerd.sandbox.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{SYSTEMD}.options]\n\
         SystemdCgroup = true\n{sandbox_api}"
    )
}

/// The configuration of a network for pods, with one plugin. Returns its directory.
fn network(directory: &Path, name: &str, plugin: &Value) -> PathBuf {
    let network = directory.join("cni").join(name);
    fs::create_dir_all(&network).expect("a directory");
    let list = json!({"cniVersion": "0.4.0", "name": name, "plugins": [plugin]});
    fs::write(network.join("10-test.conflist"), list.to_string()).expect("a file");
    network
}

/// Tests of one process run side by side, and each has a number.
fn subnet_of(id: &str) -> u32 {
    let mut numbers = id.rsplit('-').filter_map(|number| number.parse::<u32>().ok());
    let (count, process) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (process + count) % 250
}

/// The client in `tests/cri`, which is built apart.
fn client() -> PathBuf {
    let named = std::env::var_os("SANDBOX_CRI").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/sandbox-cri"))
}
