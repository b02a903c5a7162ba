//! Somebody dies under a pod, and a kubelet can clean up and go on.

use nix::sys::signal::{Signal, kill};
use sandbox_tests::Kubelet;
use sandbox_tests::containerd::SHIM;
use sandbox_tests::kubelet::{EXITED, POD_NOT_READY, RUNNING};
use serde_json::json;

const SERVICE: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

/// Makes a pod, kills the processes with this word in their command line, and cleans up as a kubelet does, which finds
/// that the pod is not ready and makes another one.
#[track_caller]
fn killed(test: &str, word: &str) {
    let Some(kubelet) = Kubelet::new(test) else { return };
    let pod = kubelet.pod("pod");
    let one = kubelet.start(&pod, "one", SERVICE, json!({}));
    let victims = kubelet.containerd.processes(word);
    assert!(!victims.is_empty());
    for victim in victims {
        // One may have ended with the other.
        let _ = kill(victim, Signal::SIGKILL);
    }
    let status = kubelet.wait_for(&["status", &one], |status| status["state"] == EXITED);
    assert_ne!(status["exit_code"], 0, "{status}");
    kubelet.wait_for(&["pod-status", &pod.id], |status| status["state"] == POD_NOT_READY);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();

    let pod = kubelet.pod_with("pod", json!({"attempt": 1}));
    let one = kubelet.start(&pod, "one", SERVICE, json!({"attempt": 1}));
    kubelet.exec(&one, "echo again").expect_stdout("again\n");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn the_machine_of_a_pod_is_killed() {
    killed("cri-machine", "sandbox-vmm");
}

#[test]
fn the_shim_of_a_pod_is_killed() {
    killed("cri-shim", &format!("{SHIM} -namespace"));
}

#[test]
fn a_containerd_that_comes_back_finds_its_pods() {
    let Some(mut kubelet) = Kubelet::new("cri-restart") else { return };
    let pod = kubelet.pod("pod");
    let stays = kubelet.start(&pod, "stays", SERVICE, json!({}));
    let ends = kubelet.start(&pod, "ends", "until [ -e /go ]; do sleep 0.1; done; exit 6", json!({}));
    kubelet.restart_containerd();
    assert_eq!(kubelet.json(&["status", &stays])["state"], RUNNING);
    kubelet.exec(&stays, "echo still there").expect_stdout("still there\n");
    // It ends with its container, maybe before it has ended by itself.
    kubelet.exec(&ends, "echo >/go");
    let status = kubelet.wait_for(&["status", &ends], |status| status["state"] == EXITED);
    assert_eq!(status["exit_code"], 6, "{status}");
    let more = kubelet.start(&pod, "more", SERVICE, json!({}));
    kubelet.exec(&more, "echo as before").expect_stdout("as before\n");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}
