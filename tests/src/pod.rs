//! Pods: a sandbox whose first container holds it together, and containers that join it.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::container::orphan_in;
use crate::orphan::{Orphan, become_subreaper};
use crate::process::Process;
use crate::{Container, Outcome, Sandbox};

const KIND: &str = "io.kubernetes.cri.container-type";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

impl Sandbox {
    /// Makes it the first container of a pod, which sleeps as `pause` does.
    pub fn pod(self) -> Self {
        let id = self.id.clone();
        self.command(["sleep", "1000"]).config(|config| {
            config["annotations"] = json!({KIND: "sandbox", SANDBOX: id});
            config["hostname"] = "pod".into();
        })
    }

    /// A container that is to join the pod whose first container this is, and to share what engines let it share.
    pub fn member<A: Into<String>>(
        &self,
        name: &str,
        first: &Container<'_>,
        command: impl IntoIterator<Item = A>,
    ) -> Member<'_> {
        let bundle = Bundle::make(&self.directory().join(name));
        let member = Member { pod: self, id: format!("{}-{name}", self.id), bundle };
        let command: Vec<String> = command.into_iter().map(Into::into).collect();
        member.config(|config| {
            config["annotations"] = json!({KIND: "container", SANDBOX: self.id});
            config["process"]["args"] = json!(command);
            config.as_object_mut().expect("an object").remove("hostname");
            for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
                share(config, kind, file, first.monitor.pid().as_raw());
            }
        })
    }
}

/// Has a configuration name the namespace of a process.
fn share(config: &mut Value, kind: &str, file: &str, pid: i32) {
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
    namespaces.retain(|namespace| namespace["type"] != kind);
    namespaces.push(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
}

/// A container of a pod that is not its first.
pub struct Member<'a> {
    pod: &'a Sandbox,
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: Bundle,
}

/// A member that was created.
pub struct Joined {
    /// `sandbox create`, which has ended: its streams are the container's.
    pub streams: Process,
    /// The process that stands for it on the host.
    pub stand_in: Orphan,
}

impl Member<'_> {
    /// Changes its config.json.
    pub fn config(self, change: impl FnOnce(&mut Value)) -> Self {
        let mut config = self.bundle.config();
        change(&mut config);
        self.bundle.write(&config);
        self
    }

    /// Has it share the process ids of the container that this process stands for.
    pub fn sharing_pids_of(self, pid: i32) -> Self {
        self.config(|config| share(config, "pid", "pid", pid))
    }

    /// Where its process id is written to.
    pub fn pid_file(&self) -> PathBuf {
        self.bundle.path().join("pid")
    }

    /// The command line of `sandbox create`.
    pub fn create_command(&self) -> Command {
        become_subreaper();
        let mut command = self.pod.base_command();
        command.arg("create").arg("--bundle").arg(self.bundle.path());
        command.arg("--pid-file").arg(self.pid_file()).arg(&self.id);
        command
    }

    /// `sandbox create`, which has to work.
    #[track_caller]
    pub fn create(&self) -> Joined {
        let mut streams = Process::spawn(&mut self.create_command());
        streams.wait_alone().expect_code(0);
        Joined { streams, stand_in: orphan_in(&self.pid_file()) }
    }

    /// `sandbox create`, which is to fail.
    #[track_caller]
    pub fn create_in_vain(&self) -> Outcome {
        Process::spawn(&mut self.create_command()).wait()
    }

    /// `sandbox create` and `sandbox start`.
    #[track_caller]
    pub fn start(&self) -> Joined {
        let joined = self.create();
        self.on("start", []).expect_stdout("");
        joined
    }

    /// A verb on it, its id before the other words. Waits for it.
    #[track_caller]
    pub fn on<const N: usize>(&self, verb: &str, words: [&str; N]) -> Outcome {
        self.pod.verb([verb, &self.id].into_iter().chain(words))
    }

    /// `sandbox exec` of a shell script in it. Waits for it.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Outcome {
        self.pod.verb(["exec", &self.id, "sh", "-c", script])
    }

    /// What `sandbox state` says it is doing.
    #[track_caller]
    pub fn status(&self) -> String {
        let outcome = self.on("state", []).expect_code(0);
        let shown: Value = serde_json::from_slice(&outcome.stdout).expect("a state is JSON");
        shown["status"].as_str().expect("a status is text").to_owned()
    }

    /// Kills it, waits for its end and deletes it.
    #[track_caller]
    pub fn end(&self, joined: &Joined) {
        self.on("kill", ["KILL"]).expect_code(0);
        assert_eq!(joined.stand_in.wait(), 137);
        self.on("delete", []).expect_stdout("");
    }
}
