//! Pods of the sandbox API: those of a handler with `sandboxer = "shim"`, which containerd has since version 2.

use std::fs;

use nix::sys::signal::{Signal, kill};
use sandbox_tests::Kubelet;
use sandbox_tests::containerd::SHIM;
use sandbox_tests::kubelet::{EXITED, POD_NOT_READY, POD_READY, RUNNING};
use serde_json::json;

const SERVICE: &str = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done";

#[test]
fn a_pod_of_the_sandbox_api_is_a_machine_with_its_containers() {
    let Some(mut kubelet) = Kubelet::with_sandbox_api("cri-api") else { return };
    let pod = kubelet.pod_with("pod", json!({"memory": 128 << 20}));
    let one = kubelet.start(&pod, "one", SERVICE, json!({"memory": 64 << 20}));
    let two = kubelet.start(&pod, "two", SERVICE, json!({"pid": "pod"}));
    assert_eq!(kubelet.containerd.processes(&format!("{SHIM} -namespace")).len(), 1);
    let known = kubelet.containerd.line("container ls --quiet").expect_code(0).out();
    assert!(known.contains(&one) && !known.contains(&pod.id), "{known}");

    // The same kernel, the same network, the same name, and a machine as large as the pod's limits.
    let both =
        "cat /proc/sys/kernel/random/boot_id; hostname; cat /etc/hostname; ip -4 -o addr show dev eth0";
    let seen = kubelet.exec(&one, both).expect_code(0).out();
    assert_eq!(kubelet.exec(&two, both).expect_code(0).out(), seen);
    assert!(seen.contains("\npod\npod\n") && seen.contains("inet 10.214."), "{seen}");
    let memory = kubelet.exec(&one, "grep MemTotal /proc/meminfo").expect_code(0).out();
    let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number");
    assert!((128 << 10..200 << 10).contains(&kib), "{memory}");
    kubelet.exec(&one, "cat /sys/fs/cgroup/memory.max").expect_stdout("67108864\n");

    // One has processes of its own, and the other one shares the pod's.
    let first = "tr '\\0' ' ' </proc/1/cmdline | grep -q trap";
    kubelet.exec(&one, first).expect_code(0);
    kubelet.exec(&two, &format!("{first} || ps -o args | grep -q '[t]rap'")).expect_code(0);
    kubelet.exec(&two, first).expect_code(1);

    // What containerd leaves to the shim: names, and memory that containers share.
    for file in ["/etc/hosts", "/etc/resolv.conf"] {
        let host = fs::read_to_string(file).expect("a file of the host's");
        kubelet.exec(&one, &format!("cat {file}")).expect_stdout(&host);
    }
    kubelet.exec(&one, "echo shared >/dev/shm/file; echo mine >/file; exit 4").expect_code(4);
    kubelet.exec(&two, "cat /dev/shm/file").expect_stdout("shared\n");
    kubelet.exec(&two, "cat /file").expect_code(1);

    let status = kubelet.json(&["pod-status", &pod.id]);
    let address = status["network"]["ip"].as_str().expect("an address");
    assert!(status["state"] == POD_READY && seen.contains(address), "{status}\n{seen}");
    assert_eq!(kubelet.log("one", 0), "ready\n");
    let stats = kubelet.json(&["stats", &one]);
    assert!(stats["memory"]["working_set_bytes"]["value"].as_u64().unwrap_or(0) > 0, "{stats}");

    // containerd finds it again, and containers come and go as before.
    kubelet.restart_containerd();
    let status = kubelet.json(&["pod-status", &pod.id]);
    assert_eq!(status["state"], POD_READY, "{}", kubelet.containerd.log());
    assert_eq!(kubelet.json(&["status", &two])["state"], RUNNING);
    kubelet.ask(["stop", &one]).expect_code(0);
    let status = kubelet.json(&["status", &one]);
    assert_eq!((&status["state"], &status["exit_code"]), (&EXITED.into(), &3.into()), "{status}");
    let again = kubelet.start(&pod, "one", SERVICE, json!({"attempt": 1}));
    kubelet.exec(&again, both).expect_stdout(&seen);
    kubelet.remove(&one);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();

    // Its name is free.
    let pod = kubelet.pod_with("pod", json!({"attempt": 1}));
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn a_pod_of_the_sandbox_api_whose_machine_or_shim_is_killed_leaves_nothing() {
    let Some(kubelet) = Kubelet::with_sandbox_api("cri-api-killed") else { return };
    for (attempt, word) in ["sandbox-vmm", &format!("{SHIM} -namespace")].into_iter().enumerate() {
        let pod = kubelet.pod_with("pod", json!({"attempt": attempt}));
        let one = kubelet.start(&pod, "one", SERVICE, json!({"attempt": attempt}));
        for victim in kubelet.containerd.processes(word) {
            // One may have ended with the other.
            let _ = kill(victim, Signal::SIGKILL);
        }
        let status = kubelet.wait_for(&["status", &one], |status| status["state"] == EXITED);
        assert_ne!(status["exit_code"], 0, "{word}: {status}");
        kubelet.wait_for(&["pod-status", &pod.id], |status| status["state"] == POD_NOT_READY);
        kubelet.end(&pod);
        kubelet.containerd.expect_no_sandbox();
    }
}
