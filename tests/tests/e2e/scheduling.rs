//! How the guest's kernel runs a process: the fields about it have the effect that they say.

use sandbox_tests::{Outcome, Sandbox, sandbox};
use serde_json::{Value, json};

/// The exit code of the runtime's own errors.
const ERROR: i32 = 125;

/// `nice`, `rt_priority` and `policy` of the process itself, from its /proc/self/stat.
fn scheduler_of(sandbox: &Sandbox) -> (i64, i64, i64) {
    let outcome = sandbox.run(["cat", "/proc/self/stat"]).expect_code(0);
    let text = outcome.out();
    let fields: Vec<i64> = text.split_whitespace().map(|word| word.parse().unwrap_or(-1)).collect();
    (fields[18], fields[39], fields[40])
}

fn with_scheduler(name: &str, scheduler: Value) -> Sandbox {
    sandbox(name).config(|config| config["process"]["scheduler"] = scheduler)
}

#[test]
fn each_scheduler_policy_with_its_parameters() {
    for (scheduler, expected) in [
        (json!({"policy": "SCHED_OTHER", "nice": 7}), (7, 0, 0)),
        (json!({"policy": "SCHED_BATCH", "nice": -3}), (-3, 0, 3)),
        (json!({"policy": "SCHED_IDLE"}), (0, 0, 5)),
        (json!({"policy": "SCHED_FIFO", "priority": 5}), (0, 5, 1)),
        (json!({"policy": "SCHED_RR", "priority": 99}), (0, 99, 2)),
        (
            json!({"policy": "SCHED_DEADLINE", "runtime": 50_000_000, "deadline": 90_000_000,
                "period": 100_000_000, "flags": ["SCHED_FLAG_RECLAIM"]}),
            (0, 0, 6),
        ),
    ] {
        let text = scheduler.to_string();
        assert_eq!(scheduler_of(&with_scheduler("scheduler", scheduler)), expected, "{text}");
    }
}

#[test]
fn a_scheduler_that_the_kernel_refuses_is_named() {
    let deadline = json!({"policy": "SCHED_DEADLINE", "runtime": 3_000_000, "deadline": 2_000_000});
    let sandbox = with_scheduler("no-scheduler", deadline);
    sandbox.run(["true"]).expect_error(ERROR, &["process.scheduler", "SCHED_DEADLINE"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn priority_for_input_and_output() {
    for (class, priority, expected) in [
        ("IOPRIO_CLASS_RT", 1, "realtime: prio 1"),
        ("IOPRIO_CLASS_BE", 6, "best-effort: prio 6"),
        ("IOPRIO_CLASS_IDLE", 0, "idle"),
    ] {
        let sandbox = sandbox("io-priority").config(|config| {
            config["process"]["ioPriority"] = json!({"class": class, "priority": priority});
        });
        let outcome = sandbox.run(["ionice"]).expect_code(0);
        assert!(outcome.out().starts_with(expected), "{class}: {outcome}");
    }
}

#[test]
fn personality_of_another_machine() {
    for (domain, machine) in [("LINUX32", "i686\n"), ("LINUX", "x86_64\n")] {
        let sandbox = sandbox("personality")
            .config(|config| config["linux"]["personality"] = json!({"domain": domain}));
        sandbox.run(["uname", "-m"]).expect_stdout(machine);
    }
}

#[test]
fn one_more_process_runs_on_the_cpus_it_is_given() {
    let sandbox = sandbox("affinity").option("--cpus", "2");
    let affinity = |initial: Option<&str>, last: Option<&str>| {
        let mut process = sandbox.bundle.config()["process"].clone();
        process["args"] = json!(["awk", "/^Cpus_allowed_list/{print $2}", "/proc/self/status"]);
        process["execCPUAffinity"] = json!({"initial": initial, "final": last});
        let file = sandbox.directory().join("process.json");
        std::fs::write(&file, process.to_string()).unwrap();
        sandbox.verb(["exec", "--process", file.to_str().unwrap(), &sandbox.id])
    };
    let mut container = sandbox.spawn(["sh", "-c", "echo ready; exec sleep 1000"]);
    container.wait_for_stdout("ready");
    let expect = |outcome: Outcome, cpus: &str| drop(outcome.expect_stdout(&format!("{cpus}\n")));
    expect(affinity(None, None), "0-1");
    expect(affinity(Some("0"), Some("1")), "1");
    expect(affinity(None, Some("0-1")), "0-1");
    affinity(None, Some("7")).expect_error(255, &["process.execCPUAffinity.final", "CPUs 7"]);
    affinity(Some("7"), None).expect_error(255, &["process.execCPUAffinity.initial", "CPUs 7"]);
    affinity(Some("7,9999"), None).expect_error(255, &["process.execCPUAffinity.initial", "7,9999"]);
    affinity(Some("x"), None).expect_error(255, &["process.execCPUAffinity", "x"]);
    // The agent is back where it was.
    expect(affinity(None, None), "0-1");
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_code(0);
    container.wait();
}

/// Three weeks, far from any uptime of a guest.
const OFFSET_SECONDS: u64 = 21 * 24 * 3600;

#[test]
fn clocks_of_a_time_namespace() {
    let sandbox = sandbox("time").config(|config| {
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
        config["linux"]["timeOffsets"] = json!({
            "boottime": {"secs": OFFSET_SECONDS, "nanosecs": 5},
            "monotonic": {"secs": OFFSET_SECONDS / 3},
        });
        // A hook is in it too.
        let args = ["sh", "-c", "cat /proc/uptime >/tmp/uptime"];
        config["hooks"]["startContainer"] = json!([{"path": "/bin/sh", "args": args, "env": ["PATH=/bin"]}]);
    });
    let uptime = |text: &str| text.split('.').next().and_then(|s| s.parse::<u64>().ok()).unwrap();
    let near = |text: &str| (OFFSET_SECONDS..OFFSET_SECONDS + 3600).contains(&uptime(text));
    let mut container =
        sandbox.spawn(["sh", "-c", "cat /proc/uptime /tmp/uptime; echo ready; exec sleep 1000"]);
    container.wait_for_stdout("ready");
    let inside = sandbox.verb(["exec", &sandbox.id, "cat", "/proc/uptime", "/proc/self/timens_offsets"]);
    assert!(near(&inside.out()), "{inside}");
    let offsets: Vec<String> =
        inside.out().lines().skip(1).map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        offsets,
        [format!("monotonic {} 0", OFFSET_SECONDS / 3), format!("boottime {OFFSET_SECONDS} 5")]
    );
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_code(0);
    let outcome = container.wait();
    assert_eq!(outcome.out().lines().filter(|line| *line != "ready" && near(line)).count(), 2, "{outcome}");
}

#[test]
fn a_time_namespace_needs_no_offsets_and_offsets_need_it() {
    let sandbox = sandbox("time-only").config(|config| {
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    });
    sandbox.run(["true"]).expect_code(0);
    let behind = sandbox.config(|config| {
        config["linux"]["timeOffsets"] = json!({"monotonic": {"secs": -1_000_000}});
    });
    behind.run(["true"]).expect_error(ERROR, &["linux.timeOffsets.monotonic", "-1000000"]);
    let without = behind.config(|config| {
        config["linux"]["namespaces"].as_array_mut().unwrap().pop();
    });
    without.run(["true"]).expect_error(ERROR, &["linux.timeOffsets.monotonic", "needs a time namespace"]);
    without.expect_clean_and_usable();
}
