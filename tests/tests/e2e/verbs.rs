//! Verbs that tell: `ps`, `features`.

use sandbox_tests::{leaks, sandbox};
use serde_json::Value;

#[test]
fn ps_lists_the_processes_with_the_column_that_engines_look_for() {
    let sandbox = sandbox("ps").command(["sh", "-c", "sleep 1234 & echo ready; wait"]);
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    let table = sandbox.on("ps", []).expect_code(0);
    let (out, header) = (table.out(), table.out().lines().next().unwrap_or_default().to_owned());
    let pid = header.split_whitespace().position(|word| word == "PID").expect("a PID column");
    let pids: Vec<u32> = (out.lines().skip(1))
        .map(|line| line.split_whitespace().nth(pid).unwrap().parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 2, "{table}");
    assert!(out.contains("sleep 1234"), "{table}");
    container.end();
}

#[test]
fn ps_in_json_has_processes_of_the_host_where_engines_look_them_up() {
    let sandbox = sandbox("ps-json").command(["sleep", "1000"]);
    let container = sandbox.start();
    let json = sandbox.on("ps", ["--format", "json"]).expect_code(0);
    let pids: Vec<i32> = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(pids.first(), Some(&container.monitor.pid().as_raw()), "{json}");
    let known = leaks::processes(&sandbox.trace());
    let known = |wanted: &i32| known.iter().find(|(pid, _)| pid.as_raw() == *wanted);
    let commands: Vec<&str> =
        pids.iter().map(|pid| known(pid).expect("it is the sandbox's").1.as_str()).collect();
    assert!(commands.iter().any(|command| command.contains("sandbox-vmm")), "{commands:?}");
    container.end();
}

#[test]
fn features_are_what_engines_read() {
    let outcome = sandbox("features").verb(["features"]).expect_code(0);
    let features: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    for (path, wanted) in [
        ("/ociVersionMin", Value::is_string as fn(&Value) -> bool),
        ("/ociVersionMax", Value::is_string),
        ("/hooks", Value::is_array),
        ("/mountOptions", Value::is_array),
        ("/linux/namespaces", Value::is_array),
        ("/linux/capabilities", Value::is_array),
        ("/linux/cgroup/v1", Value::is_boolean),
        ("/linux/cgroup/v2", Value::is_boolean),
        ("/linux/cgroup/systemd", Value::is_boolean),
        ("/linux/seccomp/enabled", Value::is_boolean),
        ("/linux/apparmor/enabled", Value::is_boolean),
        ("/linux/selinux/enabled", Value::is_boolean),
    ] {
        assert!(features.pointer(path).is_some_and(wanted), "{path}\n{outcome}");
    }
}
