//! `sandbox run`: what it runs, and how it ends.

use nix::sys::signal::Signal;
use sandbox_tests::sandbox;
use sandbox_tests::sandbox::NO_ARGS;
use serde_json::json;

#[test]
fn the_guest_has_a_kernel_of_its_own() {
    let outcome = sandbox("kernel").run(["uname", "-r"]).expect_code(0);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(outcome.out().starts_with("6.12"), "{outcome}");
    assert_ne!(outcome.out(), host);
}

#[test]
fn the_exit_code_is_the_process_s_own() {
    let sandbox = sandbox("code");
    sandbox.run(["sh", "-c", "exit 3"]).expect_code(3);
    sandbox.run(["sh", "-c", "exit 255"]).expect_code(255);
}

#[test]
fn a_process_killed_by_a_signal_is_128_and_the_signal() {
    // A container without a PID namespace: process 1 of a namespace would be immune to its own signals.
    let sandbox = sandbox("killed").config(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
    });
    sandbox.run(["sh", "-c", "kill -SEGV $$"]).expect_code(128 + 11);
    sandbox.run(["sh", "-c", "kill -KILL $$"]).expect_code(128 + 9);
}

#[test]
fn without_arguments_the_bundle_s_command_runs() {
    let sandbox =
        sandbox("own-command").config(|config| config["process"]["args"] = json!(["echo", "own command"]));
    sandbox.run(NO_ARGS).expect_stdout("own command\n");
    sandbox.run(["echo", "-n", "two  blanks", "", "end"]).expect_stdout("two  blanks  end");
}

#[test]
fn env_adds_and_replaces_variables() {
    let sandbox = sandbox("env")
        .config(|config| config["process"]["env"] = json!(["PATH=/bin", "KEPT=kept", "REPLACED=old"]))
        .option("--env", "REPLACED=new")
        .option("--env", "ADDED=a b=c");
    let outcome = sandbox.run(["env"]).expect_code(0);
    for (name, value) in [("KEPT", "kept"), ("REPLACED", "new"), ("ADDED", "a b=c"), ("PATH", "/bin")] {
        outcome.expect_value(name, value);
    }
    assert_eq!(outcome.out().matches("REPLACED").count(), 1, "{outcome}");
    assert!(!outcome.out().contains("SANDBOX_"), "the host's environment must not get in\n{outcome}");
}

#[test]
fn a_timeout_ends_with_124_and_the_machine_is_gone() {
    let sandbox = sandbox("timeout").option("--timeout", "1s");
    let outcome = sandbox.run(["sleep", "1000"]).expect_code(124);
    assert!(outcome.err().contains("1"), "the time-out is named\n{outcome}");
    sandbox.expect_nothing_left();
}

#[test]
fn a_process_that_ends_before_the_timeout_keeps_its_code() {
    sandbox("in-time").option("--timeout", "10m").run(["sh", "-c", "exit 4"]).expect_code(4);
}

#[test]
fn cpus_gives_that_many() {
    for cpus in ["1", "2", "4"] {
        sandbox("cpus").option("--cpus", cpus).run(["nproc"]).expect_stdout(&format!("{cpus}\n"));
    }
}

#[test]
fn memory_limits_the_container_and_sizes_the_machine() {
    let sandbox = sandbox("memory").option("--memory", "100M");
    let script =
        "echo limit=$(cat /sys/fs/cgroup/memory.max); awk '/MemTotal/{print \"total=\" $2}' /proc/meminfo";
    let outcome = sandbox.run(["sh", "-c", script]).expect_code(0);
    outcome.expect_value("limit", &(100 << 20).to_string());
    let total: u64 = outcome.value("total").parse().unwrap();
    assert!((100 << 10..200 << 10).contains(&total), "the machine has {total} KiB\n{outcome}");
}

#[test]
fn a_process_over_its_memory_limit_is_killed_and_the_reason_is_said() {
    let sandbox = sandbox("oom").option("--memory", "64M");
    sandbox.run(["probe", "allocate", "40"]).expect_stdout("allocated 40\n");
    let outcome = sandbox.run(["probe", "allocate", "200"]).expect_code(128 + 9);
    assert!(outcome.err().contains("memory limit"), "{outcome}");
}

#[test]
fn signals_are_forwarded() {
    let signals =
        [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGCONT, Signal::SIGTERM, Signal::SIGINT];
    let traps = "for s in HUP USR1 USR2 CONT TERM INT; do trap \"echo got-$s\" $s; done";
    let sandbox = sandbox("signals");
    let mut process =
        sandbox.spawn(["sh", "-c", &format!("{traps}; echo ready; while :; do sleep 0.1; done")]);
    process.wait_for_stdout("ready");
    for signal in signals {
        process.signal(signal);
        process.wait_for_stdout(&format!("got-{}", signal.as_str().trim_start_matches("SIG")));
    }
    assert!(process.running());
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_code(0);
    process.wait().expect_code(128 + 9);
}

#[test]
fn a_signal_that_the_process_handles_decides_its_exit_code() {
    let sandbox = sandbox("trap");
    let mut process =
        sandbox.spawn(["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"]);
    process.wait_for_stdout("ready");
    process.signal(Signal::SIGTERM);
    process.wait().expect_code(7);
}

#[test]
fn timings_go_to_standard_error_and_name_the_steps() {
    let outcome = sandbox("timings").flag("--timings").run(["echo", "x"]).expect_stdout("x\n");
    for word in ["kernel", "agent", "ms"] {
        assert!(outcome.err().to_lowercase().contains(word), "no {word}\n{outcome}");
    }
}

#[test]
fn console_keeps_what_the_guest_s_kernel_says() {
    let sandbox = sandbox("console");
    let console = sandbox.directory().join("console.log");
    let sandbox = sandbox.option("--console", &console);
    sandbox.run(["echo", "x"]).expect_stdout("x\n");
    let text = std::fs::read_to_string(console).unwrap();
    assert!(text.contains("Linux version 6.12"), "{text}");
}

#[test]
fn debug_tells_more_and_changes_nothing() {
    let plain = sandbox("plain").run(["echo", "x"]).expect_stdout("x\n");
    let sandbox = sandbox("debug").flag("--debug");
    let debug = sandbox.run(["echo", "x"]).expect_stdout("x\n");
    assert!(debug.stderr.len() > plain.stderr.len(), "{debug}");
}

#[test]
fn list_shows_what_runs_and_kill_ends_it() {
    let sandbox = sandbox("listed");
    let mut process = sandbox.spawn(["sh", "-c", "echo ready; exec sleep 1000"]);
    process.wait_for_stdout("ready");
    let listed = sandbox.verb(["list"]).expect_code(0);
    let line = listed.out().lines().find(|line| line.contains(&sandbox.id)).map(str::to_owned);
    assert!(line.is_some_and(|line| line.contains("running")), "{listed}");
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_code(0);
    process.wait().expect_code(128 + 9);
    assert!(!sandbox.verb(["list"]).expect_code(0).out().contains(&sandbox.id));
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_error(1, &[&sandbox.id]);
}

#[test]
fn list_gives_json() {
    let sandbox = sandbox("list-json");
    let mut process = sandbox.spawn(["sh", "-c", "echo ready; exec sleep 1000"]);
    process.wait_for_stdout("ready");
    let listed = sandbox.verb(["list", "--format", "json"]).expect_code(0);
    let all: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let entry = all.as_array().unwrap().iter().find(|entry| entry["id"] == *sandbox.id).unwrap();
    assert_eq!(entry["status"], "running", "{listed}");
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_code(0);
    process.wait().expect_code(128 + 9);
}

#[test]
fn old_32_bit_programs_run() {
    sandbox("elf32").run(["probe", "run32"]).expect_code(0);
}

#[test]
fn orphans_are_reaped_and_do_not_hold_the_sandbox() {
    let script = "(sleep 1000 &) ; (true &) ; sleep 0.2; echo done";
    sandbox("orphans").run(["sh", "-c", script]).expect_stdout("done\n");
}

#[test]
fn the_clock_is_the_host_s_and_entropy_is_there() {
    let before = now();
    let outcome =
        sandbox("clock").run(["sh", "-c", "date +time=%s; head -c 16 /dev/urandom | wc -c"]).expect_code(0);
    let guest: u64 = outcome.value("time").parse().unwrap();
    assert!((before - 2..=now() + 2).contains(&guest), "the guest is at {guest}\n{outcome}");
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}
