//! Pods, as a kubelet makes them, by containerd's service for Kubernetes.

use sandbox_tests::containerd::{SHIM, STRANGER, USER};
use sandbox_tests::kubelet::{CONFIGURED, EXITED, NO_INTERFACE, ONLY_LOOPBACK, Pod, RUNNING, SYSTEMD};
use sandbox_tests::leaks::cgroups_named;
use sandbox_tests::{Kubelet, skip};
use serde_json::{Value, json};

/// A script that runs until it is told to end, and says that it is there.
const SERVICE: &str = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done";

/// A script that takes all the memory that it can get.
const HOG: &str = "x=x; while :; do x=$x$x$x$x; done";

#[test]
fn a_pod_is_a_machine_with_its_containers() {
    let Some(kubelet) = Kubelet::new("cri-pod") else { return };
    let pod = kubelet.pod("pod");
    let one = kubelet.start(&pod, "one", SERVICE, json!({"memory": 64 << 20}));
    let two = kubelet.start(&pod, "two", SERVICE, json!({}));
    assert_eq!(kubelet.containerd.processes(&format!("{SHIM} -namespace")).len(), 1);

    // The same kernel, the same network, the same name; files and processes of their own.
    let both = "cat /proc/sys/kernel/random/boot_id; hostname; ip -4 -o addr show dev eth0";
    let seen = kubelet.exec(&one, both).expect_code(0).out();
    assert_eq!(kubelet.exec(&two, both).expect_code(0).out(), seen);
    assert!(seen.contains("\npod\n") && seen.contains("inet 10.214."), "{seen}");
    kubelet.exec(&one, "echo mine >/file; exit 4").expect_code(4);
    kubelet.exec(&two, "cat /file").expect_code(1);

    let status = kubelet.json(&["pod-status", &pod.id]);
    let address = status["network"]["ip"].as_str().expect("an address");
    assert!(seen.contains(address), "{status}\n{seen}");
    assert_eq!(kubelet.log("one", 0), "ready\n");
    let stats = kubelet.json(&["stats", &one]);
    for what in ["/memory/working_set_bytes/value", "/cpu/usage_core_nano_seconds/value"] {
        assert!(stats.pointer(what).and_then(Value::as_u64).unwrap_or(0) > 0, "{what}: {stats}");
    }
    let limit = "cat /sys/fs/cgroup/memory.max";
    kubelet.exec(&one, limit).expect_stdout("67108864\n");
    let limits = json!({"memory": 48 << 20, "cpu_quota": 25_000, "cpu_period": 50_000});
    kubelet.ask(["update", &one, &limits.to_string()]).expect_code(0);
    kubelet
        .exec(&one, &format!("{limit}; cat /sys/fs/cgroup/cpu.max"))
        .expect_stdout("50331648\n25000 50000\n");

    // A container is stopped and is made once more; the other one and the machine are the same.
    kubelet.ask(["stop", &one]).expect_code(0);
    let status = kubelet.json(&["status", &one]);
    assert_eq!((&status["state"], &status["exit_code"]), (&EXITED.into(), &3.into()), "{status}");
    let again = kubelet.start(&pod, "one", SERVICE, json!({"attempt": 1}));
    kubelet.exec(&again, both).expect_stdout(&seen);
    kubelet.exec(&again, "cat /file").expect_code(1);
    kubelet.remove(&one);
    kubelet.remove(&again);
    kubelet.exec(&two, both).expect_stdout(&seen);

    // So is the pod.
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
    let pod = kubelet.pod_with("pod", json!({"attempt": 1}));
    let one = kubelet.start(&pod, "one", SERVICE, json!({}));
    assert_ne!(kubelet.exec(&one, both).expect_code(0).out(), seen);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn processes_are_added_and_talked_with() {
    let Some(kubelet) = Kubelet::new("cri-talk") else { return };
    // The kubelet's cgroups are slices where systemd makes them.
    let slice = format!("cri{}.slice", std::process::id());
    let pod = kubelet.pod_with("pod", json!({"cgroup": format!("/{slice}")}));
    let scopes = cgroups_named(&format!("{slice}/cri-containerd-{}.scope", pod.id));
    assert!(scopes.iter().any(|path| path.is_dir()), "{scopes:?}");
    let echo = "while read line; do echo \"heard $line\"; done";
    let id = kubelet.start(&pod, "echo", echo, json!({"stdin": true}));
    for word in ["one", "two"] {
        let heard = format!("heard {word}");
        kubelet.ask(["attach", &id, &format!("{word}\n"), &heard]).expect_code(0).expect_words(&[&heard]);
    }
    assert_eq!(kubelet.log("echo", 0), "heard one\nheard two\n");

    let script = "read line; echo \"$line\"; echo error >&2; exit 5";
    let outcome = kubelet.ask(["stream-exec", &id, "hello\n", "sh", "-c", script]).expect_code(5);
    assert_eq!((outcome.out().as_str(), outcome.err().as_str()), ("hello\n", "error\n"));

    share_processes_and_talk_on_terminals(&kubelet, &pod, &id);

    // Probes: one that is in order, one that is not, one that is killed because it takes too long.
    kubelet.exec(&id, "true").expect_code(0);
    kubelet.exec(&id, "exit 7").expect_code(7);
    kubelet.ask(["exec", &id, "2", "sleep", "654321"]).expect_error(1, &["timeout 2s exceeded"]);
    kubelet.exec(&id, "ps | grep -c '[6]54321'").expect_code(1);
    kubelet.ask(["exec", &id, "60", "/no/such"]).expect_error(1, &["/no/such"]);
    assert_eq!(kubelet.json(&["status", &id])["state"], RUNNING);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
    assert!(!scopes.iter().any(|path| path.exists()), "{scopes:?}");
    for slice in cgroups_named(&slice) {
        // It is the kubelet's to remove, and not in every directory that was looked at.
        let _ = std::fs::remove_dir(slice);
    }
}

/// Containers that share the pod's processes (`shareProcessNamespace`), one that looks at those of another
/// (`kubectl debug --target`), and terminals.
fn share_processes_and_talk_on_terminals(kubelet: &Kubelet, pod: &Pod, alone: &str) {
    let sleeper = kubelet.start(pod, "sleeper", "sleep 777001; true", json!({"pid": "pod"}));
    let sized = "until [ \"$(stty size)\" = '31 91' ]; do sleep 0.1; done";
    let answer = format!("while read line; do {sized}; echo \"$line: $(tty)\"; done");
    let talker = json!({"pid": "pod", "stdin": true, "tty": true});
    let talker = kubelet.start(pod, "talker", &answer, talker);
    let terminal = ["tty-attach", &talker, "91x31", "word\r", "word: /dev/pts/"];
    kubelet.ask(terminal).expect_code(0).expect_words(&["word: /dev/pts/"]);
    let script = format!("{sized}; tty; read line; echo \"got $line\"; exit 5");
    let outcome = kubelet.ask(["tty-exec", &talker, "91x31", "hello\r", "sh", "-c", &script]);
    outcome.expect_code(5).expect_words(&["/dev/pts/", "got hello"]);

    let debugger = kubelet.start(pod, "debugger", SERVICE, json!({"pid": {"target": alone}}));
    let sees =
        |id: &str, what: &str| kubelet.exec(id, &format!("ps -o args | grep -q '{what}'")).code() == Some(0);
    let (asleep, hears) = ("[7]77001", "[h]eard .line");
    assert!(sees(&talker, asleep) && !sees(&talker, hears), "the pod's are those that share them");
    assert!(sees(&debugger, hears) && !sees(&debugger, asleep), "the target's are its own");
    assert!(!sees(alone, asleep) && sees(alone, hears), "a container's are its own");
    let end = format!("ps -o pid,args | grep '{asleep}' | while read pid rest; do kill $pid; done");
    kubelet.exec(&talker, &end).expect_code(0);
    let status = kubelet.wait_for(&["status", &sleeper], |status| status["state"] == EXITED);
    assert_eq!(status["exit_code"], 143, "{status}");
    for id in [&talker, &debugger] {
        assert_eq!(kubelet.json(&["status", id])["state"], RUNNING);
    }
}

#[test]
fn a_container_is_as_its_image_and_its_configuration_say() {
    let Some(kubelet) = Kubelet::new("cri-kinds") else { return };
    // The machine is as large as the pod's limits.
    let pod = kubelet.pod_with("pod", json!({"memory": 128 << 20}));
    let run = |name: &str, script: &str, besides: Value| kubelet.run(&pod, name, script, besides);

    let (_, log) = run("size", "grep MemTotal /proc/meminfo", json!({}));
    let kib = log.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number");
    assert!((128 << 10..200 << 10).contains(&kib), "{log}");
    let (_, log) = run("image-user", "id -u; echo >/file || echo refused", json!({"image": USER}));
    assert!(log.contains("1000\n") && log.contains("refused\n"), "{log}");
    let (_, log) = run("user", "id -u; id -G", json!({"user": 2000, "groups": [3000]}));
    assert_eq!(log, "2000\n0 3000\n");
    let (_, log) = run("read-only", "echo >/file || echo refused", json!({"read_only": true}));
    assert!(log.contains("Read-only") && log.contains("refused"), "{log}");

    let (status, _) = run("hog", HOG, json!({"memory": 32 << 20}));
    assert_eq!((&status["reason"], &status["exit_code"]), (&"OOMKilled".into(), &137.into()), "{status}");
    let (status, _) = run("fails", "exit 4", json!({}));
    assert_eq!((&status["reason"], &status["exit_code"]), (&"Error".into(), &4.into()), "{status}");

    // What cannot be made is said, and its name is free.
    kubelet.create(&pod, "odd", "true", json!({"image": STRANGER})).expect_error(1, &["no users found"]);
    let nowhere = json!({"mounts": [{"host": "/proc/no/such", "container": "/data"}]});
    kubelet.create(&pod, "odd", "true", nowhere).expect_error(1, &["/proc/no/such"]);
    let (status, _) = run("odd", "true", json!({}));
    assert_eq!(status["reason"], "Completed", "{status}");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn a_pod_that_cannot_be_is_refused_and_leaves_its_name_free() {
    let Some(kubelet) = Kubelet::new("cri-refused") else { return };
    let refused = |besides: Value, word: &str| {
        let config = kubelet.pod_config("pod", besides).to_string();
        kubelet.ask(["run-pod", &config]).expect_error(1, &[word]);
        kubelet.containerd.expect_no_sandbox();
    };
    refused(json!({"handler": "unknown"}), "unknown");
    refused(json!({"host_network": true}), "the host's network");
    refused(json!({"handler": ONLY_LOOPBACK}), "failed to find network info");
    // An address without an interface, as where a device of its own is the pod's network, is a pod: with its loopback.
    let pod = kubelet.pod_with("pod", json!({"handler": NO_INTERFACE}));
    let talk = "nc -l -p 7000 -e echo heard & until nc 127.0.0.1 7000 </dev/null; do sleep 0.1; done";
    let (_, log) = kubelet.run(&pod, "one", &format!("ls /sys/class/net; {talk} 2>/dev/null"), json!({}));
    assert_eq!(log, "lo\nheard\n");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn a_handler_has_options() {
    let Some(kubelet) = Kubelet::new("cri-options") else { return };
    let refused = |handler: &str, words: &[&str]| {
        let besides =
            json!({"handler": handler, "cgroup": "/tests.slice", "annotations": {"dev.sandbox.vcpus": "2"}});
        let config = kubelet.pod_config("pod", besides);
        kubelet.ask(["run-pod", &config.to_string()]).expect_error(1, words);
        kubelet.containerd.expect_no_sandbox();
    };
    let other = kubelet.containerd.path("other.toml");
    refused(CONFIGURED, &["ConfigPath", "other.toml", "No such file"]);
    std::fs::write(&other, "state.root = \"/elsewhere\"\n").expect("a file");
    refused(CONFIGURED, &["ConfigPath", "`state.root` cannot be set"]);
    // What the pod's author asks for is the operator's to grant.
    let sized = "machine.pod_memory = \"192M\"\n";
    std::fs::write(&other, sized).expect("a file");
    refused(CONFIGURED, &["annotations.dev.sandbox.vcpus", "the operator of this host does not allow it"]);
    std::fs::write(&other, format!("{sized}annotations.allowed = [\"dev.sandbox.vcpus\"]\n"))
        .expect("a file");
    let asked = json!({"handler": CONFIGURED, "annotations": {"dev.sandbox.vcpus": "2"}});
    let pod = kubelet.pod_with("pod", asked);
    let (_, log) = kubelet.run(&pod, "one", "nproc; grep MemTotal /proc/meminfo", json!({}));
    let kib = log.split_whitespace().nth(2).and_then(|kib| kib.parse::<u64>().ok()).expect("a number");
    assert!(log.starts_with("2\n") && kib < 192 << 10, "{log}");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();

    if std::path::Path::new("/run/systemd/system").exists() {
        return skip("cri-options", "this host has systemd, which is tested by `systemd.rs`");
    }
    if kubelet.containerd.version().starts_with("1.6") {
        return skip("cri-options", "containerd 1.6 passes no SystemdCgroup on");
    }
    refused(SYSTEMD, &["systemd does not run on this host", "SystemdCgroup = false"]);
}
