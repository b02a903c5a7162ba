//! A monitor that is killed: `state` says so, `delete` cleans up, and the id works again.

use std::path::Path;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use sandbox_tests::place::patience;
use sandbox_tests::process::{POLL, Process};
use sandbox_tests::{Container, Sandbox, leaks, sandbox};

#[test]
fn a_monitor_killed_in_each_state_is_stopped_and_can_be_deleted() {
    let sandbox = sandbox("monitor-killed").command(["sleep", "1000"]);
    for state in ["created", "running", "paused"] {
        let container = sandbox.create();
        if state != "created" {
            sandbox.on("start", []).expect_code(0);
        }
        if state == "paused" {
            sandbox.on("pause", []).expect_code(0);
        }
        assert_eq!(sandbox.status(), state);
        kill_monitor(&container);
        sandbox.wait_for_status("stopped");
        let shown = sandbox.shown();
        assert_eq!((shown["status"].as_str(), shown["pid"].as_i64()), (Some("stopped"), Some(0)), "{state}");
        leaks::expect_no_process(&sandbox.trace());
        for (verb, words) in
            [("start", "stopped"), ("kill", "container not running"), ("ps", "container not running")]
        {
            sandbox.on(verb, []).expect_error(1, &[words]);
        }
        sandbox.exec(&[], ["true"]).expect_error(255, &["stopped"]);
        sandbox.on("delete", []).expect_stdout("");
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_monitor_killed_while_it_creates_leaves_nothing() {
    let sandbox = sandbox("creator-killed").command(["sleep", "1000"]);
    for _ in 0..3 {
        let create = create_to_its_record(&sandbox);
        let processes = leaks::processes(&sandbox.trace());
        let (monitor, _) =
            processes.iter().find(|(_, command)| command.contains(" monitor")).expect("a monitor");
        kill(*monitor, Signal::SIGKILL).unwrap();
        create.wait().expect_error(1, &["monitor died"]);
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_create_that_is_killed_leaves_nothing() {
    let sandbox = sandbox("create-killed").command(["sleep", "1000"]);
    for _ in 0..3 {
        let create = create_to_its_record(&sandbox);
        create.signal(Signal::SIGKILL);
        let outcome = create.wait();
        assert_ne!(outcome.code(), Some(0), "{outcome}");
        // It may have been too late for that.
        if !Path::new(&sandbox.pid_file()).exists() {
            sandbox.expect_nothing_left();
        }
        sandbox.on("delete", ["--force"]).expect_code(0);
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_added_process_ends_with_an_error_when_the_monitor_is_killed() {
    let sandbox = sandbox("exec-orphan").command(["sleep", "1000"]);
    let container = sandbox.start();
    let mut exec =
        Process::spawn(&mut sandbox.exec_command(&[], ["sh", "-c", "echo ready; exec sleep 1000"]));
    exec.wait_for_stdout("ready");
    kill_monitor(&container);
    exec.wait().expect_error(255, &["sandbox"]);
    sandbox.wait_for_status("stopped");
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn the_machine_killed_ends_the_container() {
    let sandbox = sandbox("machine-killed").command(["sleep", "1000"]);
    let container = sandbox.start();
    let processes = leaks::processes(&sandbox.trace());
    let (machine, _) =
        processes.iter().find(|(_, command)| command.contains("sandbox-vmm")).expect("a machine");
    kill(*machine, Signal::SIGKILL).unwrap();
    assert_eq!(container.monitor.wait(), 125);
    assert_eq!(sandbox.status(), "stopped");
    sandbox.on("delete", []).expect_code(0);
    sandbox.expect_clean_and_usable();
}

/// A `create` that has come so far that others know of the container; the machine's start, most of it, is to come.
fn create_to_its_record(sandbox: &Sandbox) -> Process {
    let create = Process::spawn(&mut sandbox.create_command());
    // Seen here and not asked of a command, which takes part of the time that is left.
    let record = sandbox.state().join(&sandbox.id).join("state.json");
    let deadline = Instant::now() + patience();
    while !record.exists() {
        assert!(Instant::now() < deadline, "there is no {}", record.display());
        std::thread::sleep(POLL);
    }
    create
}

fn kill_monitor(container: &Container<'_>) {
    container.monitor.signal(Signal::SIGKILL);
    assert_eq!(container.monitor.wait(), 137);
}
