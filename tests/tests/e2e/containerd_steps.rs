//! Somebody dies at each step of create and start under containerd: an error says so, nothing is left, and the name can
//! be used again, which is how the next step is come to.

use std::fs;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_tests::place::{on_kvm, patience, skip};
use sandbox_tests::process::{POLL, Process};
use sandbox_tests::{Containerd, Gates, initramfs};
use serde_json::{Value, json};

/// Where the guest finds the gates.
const IN_GUEST: &str = "/gates";

/// The last gate, which no start gets past here.
const LAST: &str = "poststart";

/// A step of create and start, by what is seen of it.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The shim has been started, and hears what it is to make.
    Shim,
    /// The machine's process has been started.
    Vmm,
    /// The machine runs, and the guest boots.
    Boots,
    /// The guest is ready, and the container is about to be made.
    Ready,
    /// The container has been made, and is about to stand for others.
    Made,
    /// Its process is about to be started.
    Starts,
    /// Its process runs, and whoever started it is about to hear so.
    Runs,
}

impl Step {
    /// The gate at that step, or else the last one.
    fn gate(self) -> &'static str {
        match self {
            Self::Ready => "createRuntime",
            Self::Made => "createContainer",
            Self::Starts => "startContainer",
            Self::Shim | Self::Vmm | Self::Boots | Self::Runs => LAST,
        }
    }
}

/// A containerd whose container can be left at each step of its start.
struct Steps {
    containerd: Containerd,
    gates: Gates,
}

impl Steps {
    fn new(name: &str, containerd: impl FnOnce(&str) -> Option<Containerd>) -> Option<Self> {
        if on_kvm() {
            skip(name, "the steps are the same on every machine, and take the emulated one minutes");
            return None;
        }
        let containerd = containerd(name)?;
        let gates = Gates::make(&containerd.path("gates"));
        Some(Self { containerd, gates })
    }

    /// Starts the container, and leaves it at a step.
    #[track_caller]
    fn start(&self, step: Step) -> Process {
        self.gates.close(step.gate());
        let booted = self.boots();
        let mut client = self.run("sleep 1000");
        let deadline = Instant::now() + patience();
        while !self.is_at(step, booted) {
            let may_come = client.running() && Instant::now() < deadline;
            assert!(may_come, "{step:?} was not reached: {}", self.containerd.log());
            std::thread::sleep(POLL);
        }
        client
    }

    /// `ctr run` of the container with a shell script.
    fn run(&self, script: &str) -> Process {
        let bundle = fs::read(self.containerd.path("bundle/config.json")).expect("a bundle");
        let mut config: Value = serde_json::from_slice(&bundle).expect("it is JSON");
        config["root"] = json!({"path": self.containerd.path("bundle/rootfs"), "readonly": true});
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["linux"]["cgroupsPath"] = format!("/{}/box", self.containerd.id()).into();
        config["hooks"] = self.gates.hooks(Some(IN_GUEST));
        let (source, options) = (self.gates.directory(), ["bind"]);
        let gates = json!({"destination": IN_GUEST, "type": "bind", "source": source, "options": options});
        config["mounts"].as_array_mut().expect("there are mounts").push(gates);
        let path = self.containerd.path("box.json");
        fs::write(&path, config.to_string()).expect("a file");
        let path = path.display().to_string();
        let words = ["run", "--rm", "--runtime", "io.containerd.sandbox.v2", "--config", &path, "box"];
        Process::spawn(&mut self.containerd.command(words))
    }

    #[track_caller]
    fn wait_until(&self, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + patience();
        while !is_so() {
            assert!(Instant::now() < deadline, "{}", self.containerd.log());
            std::thread::sleep(POLL);
        }
    }

    fn is_at(&self, step: Step, booted: usize) -> bool {
        match step {
            Step::Shim => !self.containerd.shims().is_empty(),
            Step::Vmm => !self.machines().is_empty(),
            Step::Boots => self.boots() > booted && !self.machines().is_empty(),
            Step::Ready | Step::Made | Step::Starts | Step::Runs => self.gates.is_reached(step.gate()),
        }
    }

    /// How many machines have run, as the shims say.
    fn boots(&self) -> usize {
        self.containerd.log().matches("msg=\"machine: ").count()
    }

    /// The directory of the container's bundle.
    fn bundle(&self) -> String {
        let below = format!("run/io.containerd.runtime.v2.task/{}/box", self.containerd.id());
        self.containerd.path(&below).display().to_string()
    }

    fn machines(&self) -> Vec<Pid> {
        self.containerd.processes("sandbox-vmm")
    }

    /// Removes what containerd knows of the container still, and then nothing is left.
    #[track_caller]
    fn remove(&self) {
        self.forget();
        self.containerd.expect_no_sandbox();
    }

    /// Removes what containerd knows of the container still.
    fn forget(&self) {
        self.containerd.line("task rm --force box");
        self.containerd.line("container rm box");
    }

    /// Nothing is left, and the container runs when nobody dies.
    #[track_caller]
    fn expect_usable(&self) {
        self.containerd.expect_no_sandbox();
        let outcome = self.run("echo runs").wait();
        assert_eq!(outcome.out(), "runs\n", "{outcome}\n{}", self.containerd.log());
        self.containerd.expect_no_sandbox();
    }
}

/// Kills processes. One may have ended with the other.
fn kill_all(victims: &[Pid]) {
    assert!(!victims.is_empty(), "nobody is there to be killed");
    for victim in victims {
        let _ = kill(*victim, Signal::SIGKILL);
    }
}

#[test]
fn the_machine_is_killed_at_each_step() {
    let Some(steps) = Steps::new("ctr-steps-vmm", Containerd::new) else { return };
    for step in [Step::Vmm, Step::Boots, Step::Ready, Step::Made, Step::Starts, Step::Runs] {
        let client = steps.start(step);
        kill_all(&steps.machines());
        let outcome = client.wait();
        assert!(outcome.code() == Some(1) && outcome.err().contains("sandbox-vmm"), "{step:?}: {outcome}");
        steps.gates.open(step.gate());
        steps.remove();
    }
    steps.expect_usable();
}

#[test]
fn the_agent_dies_at_each_request() {
    let Some(steps) = Steps::new("ctr-steps-agent", Containerd::new) else { return };
    let image = steps.containerd.path("image-that-dies");
    for verb in ["configure", "create", "start"] {
        initramfs::write(&image, Some(&format!("die,{verb}"))).expect("an image");
        let outcome = steps.containerd.with_artefact("guest.img", &image, || steps.run("true").wait());
        let said = outcome.err();
        let is_said = said.contains("panic") && said.contains("these are the last words");
        assert!(outcome.code() == Some(1) && is_said, "{verb}: {outcome}");
        steps.remove();
    }
    steps.expect_usable();
}

#[test]
fn the_shim_is_killed_at_each_step() {
    let Some(steps) = Steps::new("ctr-steps-shim", Containerd::new) else { return };
    for step in [Step::Shim, Step::Vmm, Step::Boots, Step::Ready, Step::Made, Step::Starts, Step::Runs] {
        let client = steps.start(step);
        kill_all(&steps.containerd.shims());
        let outcome = client.wait();
        assert_ne!(outcome.code(), Some(0), "{step:?}: {outcome}");
        steps.gates.open(step.gate());
        steps.containerd.wait_for_status("box", None);
        match step {
            Step::Shim => {
                // containerd may not know of it yet: the directory that it has made goes with the next one's. A machine
                // that it had begun to start is not to be taken for the next one's.
                steps.forget();
                steps.containerd.expect_no_process();
            }
            _ => steps.remove(),
        }
    }
    steps.expect_usable();
}

#[test]
fn containerd_is_killed_at_each_step() {
    let Some(mut steps) = Steps::new("ctr-steps-daemon", Containerd::new) else { return };
    for step in [Step::Shim, Step::Vmm, Step::Boots, Step::Ready, Step::Made, Step::Starts, Step::Runs] {
        let client = steps.start(step);
        steps.containerd.kill();
        let outcome = client.wait();
        assert_ne!(outcome.code(), Some(0), "{step:?}: {outcome}");
        steps.containerd.start();
        steps.gates.open(step.gate());
        // It may have found the container as it was when it was killed.
        steps.remove();
    }
    steps.expect_usable();
}

#[test]
fn containerd_gives_up_on_the_removal_of_what_a_killed_shim_has_left() {
    let Some(steps) = Steps::new("ctr-impatient", |name| Containerd::impatient(name, "2s")) else { return };
    let client = steps.start(Step::Runs);
    steps.gates.close("poststop");
    kill_all(&steps.containerd.shims());
    steps.wait_until(|| steps.gates.is_reached("poststop"));
    // The process that containerd has started, and kills.
    let started = format!("-bundle {} delete", steps.bundle());
    steps.wait_until(|| steps.containerd.processes(&started).is_empty());
    steps.gates.open("poststop");
    steps.gates.open(LAST);
    assert_ne!(client.wait().code(), Some(0));
    steps.containerd.expect_no_sandbox();
}
