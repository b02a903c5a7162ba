//! `pause`, `resume`, `update`, `events`: a running container held, and its limits changed.

use std::time::Duration;

use sandbox_tests::process::Process;
use sandbox_tests::sandbox;
use serde_json::Value;

#[test]
fn a_paused_container_stands_still_and_goes_on() {
    let counter = "i=0; while :; do i=$((i+1)); echo $i > /tmp/n; [ $i = 1 ] && echo ready; sleep 0.02; done";
    let sandbox = sandbox("pause").command(["sh", "-c", counter]);
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    let count = || -> u64 {
        // What the container writes goes through to the bundle.
        std::fs::read_to_string(sandbox.bundle.root("tmp/n")).unwrap().trim().parse().unwrap_or(0)
    };
    sandbox.on("pause", []).expect_stdout("");
    assert_eq!(sandbox.status(), "paused");
    let held = count();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(count(), held);
    sandbox.on("pause", []).expect_error(1, &["container not running"]);
    sandbox.exec(&[], ["true"]).expect_error(255, &["paused"]);
    sandbox.on("ps", []).expect_code(0);
    sandbox.on("resume", []).expect_stdout("");
    assert_eq!(sandbox.status(), "running");
    while count() <= held {}
    sandbox.on("resume", []).expect_error(1, &["container not paused"]);
    sandbox.on("pause", []).expect_code(0);
    // What is paused can be killed.
    container.end();
    sandbox.expect_nothing_left();
}

#[test]
fn limits_that_are_changed_are_seen_in_the_guest() {
    let sandbox = sandbox("update").command(["sleep", "1000"]);
    let container = sandbox.start();
    let limit =
        |file: &str| sandbox.exec(&[], ["cat", &format!("/sys/fs/cgroup/{file}")]).expect_code(0).out();
    let flags = ["--memory", "64M", "--cpu-quota", "20000", "--cpu-period", "40000", "--pids-limit", "77"];
    sandbox.on("update", flags).expect_stdout("");
    sandbox.on("update", ["--blkio-weight", "505"]).expect_stdout("");
    assert_eq!(limit("io.weight"), "default 5000\n");
    assert_eq!(limit("memory.max"), format!("{}\n", 64 << 20));
    assert_eq!(limit("cpu.max"), "20000 40000\n");
    assert_eq!(limit("pids.max"), "77\n");
    let mut update = Process::spawn(&mut sandbox.update_command(&["--resources", "-"]));
    update.write(br#"{"memory": {"limit": 100663296}, "pids": {"limit": 3}, "cpu": {"quota": -1}}"#);
    update.wait().expect_stdout("");
    assert_eq!(limit("memory.max"), format!("{}\n", 96 << 20));
    assert_eq!(limit("cpu.max"), "max 40000\n");
    // By effect: the container has room for two more.
    sandbox.exec(&[], ["sh", "-c", "sleep 1 & sleep 1 & sleep 1 & wait"]).expect_error(2, &["fork"]);
    container.end();
}

#[test]
fn limits_that_cannot_be_changed_are_named_by_their_path() {
    let sandbox = sandbox("update-bad").command(["sleep", "1000"]);
    let container = sandbox.start();
    for (text, words) in [
        (r#"{"memory": {"kernelTCP": 10}}"#, "linux.resources.memory.kernelTCP"),
        (r#"{"rdma": {"mlx5_1": {"hcaHandles": 3}}}"#, "linux.resources.rdma"),
        (r#"{"memroy": {"limit": 10}}"#, "linux.resources.memroy"),
        (r#"{"memory": {"limit": "much"}}"#, "limit"),
        (r#"{"memory": "#, "--resources"),
        ("[]", "linux.resources"),
    ] {
        let mut update = Process::spawn(&mut sandbox.update_command(&["--resources", "-"]));
        update.write(text.as_bytes());
        update.wait().expect_error(1, &[words]);
    }
    for (flag, value, words) in [
        ("--kernel-memory", "10M", "linux.resources.memory.kernel"),
        ("--kernel-memory-tcp", "10M", "linux.resources.memory.kernelTCP"),
        ("--cpu-rt-period", "1000", "linux.resources.cpu.realtimePeriod"),
        ("--cpu-rt-runtime", "1000", "linux.resources.cpu.realtimeRuntime"),
        ("--l3-cache-schema", "L3:0=f", "--l3-cache-schema"),
        ("--mem-bw-schema", "MB:0=20", "--mem-bw-schema"),
    ] {
        sandbox.on("update", [flag, value]).expect_error(1, &[words]);
    }
    // What engines send although it asks for nothing.
    let mut update = Process::spawn(&mut sandbox.update_command(&["--resources", "-"]));
    update.write(
        br#"{"blockIO": {"weight": 0}, "memory": {"kernel": 0}, "unified": {}, "hugepageLimits": []}"#,
    );
    update.wait().expect_stdout("");
    sandbox.on("update", ["--resources", "/no/such/file"]).expect_error(1, &["/no/such/file"]);
    sandbox.on("update", ["--memory", "much"]).expect_error(2, &["--memory"]);
    container.end();
}

#[test]
fn a_limit_below_what_is_in_use_can_be_refused() {
    let sandbox = sandbox("update-check").command([
        "sh",
        "-c",
        "head -c 30000000 /dev/zero > /dev/shm/x; echo ready; exec sleep 1000",
    ]);
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    let mut update = Process::spawn(&mut sandbox.update_command(&["--resources", "-"]));
    update.write(br#"{"memory": {"limit": 8388608, "checkBeforeUpdate": true}}"#);
    update.wait().expect_error(1, &["memory"]);
    assert_eq!(sandbox.status(), "running");
    container.end();
}

#[test]
fn events_have_the_numbers_that_engines_read() {
    let sandbox = sandbox("events").command(["sleep", "1000"]);
    let container = sandbox.start();
    sandbox.on("update", ["--memory", "64M", "--pids-limit", "50"]).expect_code(0);
    let outcome = sandbox.on("events", ["--stats"]).expect_code(0);
    let beginning = format!("{{\"type\":\"stats\",\"id\":\"{}\",\"data\":{{", sandbox.id);
    assert!(outcome.out().starts_with(&beginning), "as runc writes it: {outcome}");
    let event: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    assert_eq!((event["type"].as_str(), event["id"].as_str()), (Some("stats"), Some(sandbox.id.as_str())));
    let number = |path: &str| {
        event.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {outcome}"))
    };
    assert!(number("/data/cpu/usage/total") > 0);
    assert!(number("/data/memory/usage/usage") > 0);
    assert_eq!(number("/data/memory/usage/limit"), 64 << 20);
    assert_eq!((number("/data/pids/current"), number("/data/pids/limit")), (1, 50));
    let mut stream =
        Process::spawn(&mut sandbox.verb_command(["events", "--interval", "100ms", &sandbox.id]));
    while stream.so_far().0.lines().count() < 3 {}
    container.end();
    stream.wait_alone().expect_code(0);
}
