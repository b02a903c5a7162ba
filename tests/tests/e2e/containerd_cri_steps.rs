//! Somebody dies while a pod is made, or at a step of a container's start: the kubelet hears why, nothing is left, and the
//! names can be used again.

use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_tests::Kubelet;
use sandbox_tests::kubelet::GATED;
use sandbox_tests::place::patience;
use sandbox_tests::process::{POLL, Process};
use serde_json::json;

const SERVICE: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

/// The steps of a container's start: it is about to be made, it is made, it runs.
const STEPS: [&str; 3] = ["createRuntime", "createContainer", "poststart"];

/// Kills processes. One may have ended with the other.
fn kill_all(victims: Vec<Pid>) {
    assert!(!victims.is_empty(), "nobody is there to be killed");
    for victim in victims {
        let _ = kill(victim, Signal::SIGKILL);
    }
}

fn machines(kubelet: &Kubelet) -> Vec<Pid> {
    kubelet.containerd.processes("sandbox-vmm")
}

fn shims(kubelet: &Kubelet) -> Vec<Pid> {
    kubelet.containerd.shims()
}

/// Asks for a pod, and kills these as soon as some of those are there. Whoever asked hears why.
#[track_caller]
fn kill_while_made(
    kubelet: &Kubelet,
    there: fn(&Kubelet) -> Vec<Pid>,
    victims: fn(&Kubelet) -> Vec<Pid>,
    said: &str,
) {
    let config = kubelet.pod_config("pod", json!({})).to_string();
    let asked = Process::spawn(&mut kubelet.command(["run-pod", &config]));
    let deadline = Instant::now() + patience();
    while there(kubelet).is_empty() {
        assert!(Instant::now() < deadline, "nobody comes: {}", kubelet.containerd.log());
        std::thread::sleep(POLL);
    }
    kill_all(victims(kubelet));
    asked.wait().expect_error(1, &[said]);
}

#[test]
fn the_machine_or_the_shim_of_a_pod_is_killed_while_it_is_made() {
    let Some(kubelet) = Kubelet::new("cri-steps-pod") else { return };
    kill_while_made(&kubelet, machines, machines, "sandbox-vmm");
    kubelet.containerd.expect_no_sandbox();
    kill_while_made(&kubelet, machines, shims, "");
    kubelet.containerd.expect_no_sandbox();
    // containerd may not know of it yet: the directory that it has made goes with the next one's.
    kill_while_made(&kubelet, shims, shims, "");
    let pod = kubelet.pod("pod");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn the_machine_is_killed_at_each_step_of_a_containers_start() {
    let Some(kubelet) = Kubelet::new("cri-steps-vmm") else { return };
    for step in STEPS {
        let pod = kubelet.pod_with("pod", json!({"handler": GATED}));
        let id = kubelet.create(&pod, "one", SERVICE, json!({})).expect_code(0).out();
        kubelet.gates.close(step);
        let mut asked = Process::spawn(&mut kubelet.command(["start", id.trim()]));
        kubelet.gates.wait_at(step, &mut asked);
        kill_all(machines(&kubelet));
        let outcome = asked.wait();
        kubelet.gates.open(step);
        assert!(outcome.code() == Some(1) && outcome.err().contains("sandbox-vmm"), "{step}: {outcome}");
        kubelet.end(&pod);
        kubelet.containerd.expect_no_sandbox();
    }
}

#[test]
fn containerd_is_killed_at_each_step_of_a_containers_start() {
    let Some(mut kubelet) = Kubelet::new("cri-steps-daemon") else { return };
    let pod = kubelet.pod_with("pod", json!({"handler": GATED}));
    for step in STEPS {
        let id = kubelet.create(&pod, "one", SERVICE, json!({})).expect_code(0).out();
        kubelet.gates.close(step);
        let mut asked = Process::spawn(&mut kubelet.command(["start", id.trim()]));
        kubelet.gates.wait_at(step, &mut asked);
        kubelet.containerd.kill();
        kubelet.gates.open(step);
        kubelet.restart_containerd();
        assert_ne!(asked.wait().code(), Some(0), "{step}");
        kubelet.remove(id.trim());
    }
    let one = kubelet.start(&pod, "one", SERVICE, json!({}));
    kubelet.exec(&one, "echo sound").expect_stdout("sound\n");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}
