//! What ends in the middle: interrupts, killed processes, killed callers. Nothing is left, whatever the moment.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use sandbox_tests::process::Process;
use sandbox_tests::{Sandbox, leaks, sandbox};

/// Moments of a start, in milliseconds after it, from the first process to well after the container runs.
const MOMENTS: [u64; 8] = [5, 30, 80, 200, 400, 800, 1500, 4000];

fn sleeper(sandbox: &Sandbox) -> Process {
    sandbox.spawn(["sh", "-c", "echo ready; exec sleep 1000"])
}

#[test]
fn the_vmm_killed_at_any_moment_of_a_start() {
    killed_at_any_moment("vmm-killed", "sandbox-vmm");
}

#[test]
fn every_helper_process_killed_at_any_moment_of_a_start() {
    let sandbox = sandbox("helper-killed");
    for moment in MOMENTS {
        let client = sleeper(&sandbox);
        std::thread::sleep(Duration::from_millis(moment));
        let mut helpers = leaks::processes(&sandbox.trace());
        helpers.retain(|(pid, _)| *pid != client.pid());
        if helpers.is_empty() {
            // The client had not started anything yet: the start is cut off at the client instead.
            client.signal(Signal::SIGKILL);
        }
        for (pid, _) in helpers {
            let _ = kill(pid, Signal::SIGKILL);
        }
        expect_failure(client, moment);
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

fn killed_at_any_moment(name: &str, program: &str) {
    let sandbox = sandbox(name);
    let mut hit = 0;
    for moment in MOMENTS {
        let client = sleeper(&sandbox);
        std::thread::sleep(Duration::from_millis(moment));
        let processes = leaks::processes(&sandbox.trace());
        let targets: Vec<_> = processes.iter().filter(|(_, command)| command.contains(program)).collect();
        if targets.is_empty() {
            // Too early for it: the start is cut off at the client instead.
            client.signal(Signal::SIGKILL);
        }
        for (pid, _) in targets {
            hit += 1;
            let _ = kill(*pid, Signal::SIGKILL);
        }
        expect_failure(client, moment);
        sandbox.expect_nothing_left();
    }
    assert!(hit >= 4, "{program} was hit {hit} times only");
    sandbox.expect_clean_and_usable();
}

fn expect_failure(client: Process, moment: u64) {
    let outcome = client.wait();
    assert_ne!(outcome.code(), Some(0), "killed after {moment} ms\n{outcome}");
    assert!(!outcome.err().contains("panicked at"), "killed after {moment} ms\n{outcome}");
}

#[test]
fn the_vmm_killed_while_the_container_runs_is_said() {
    let sandbox = sandbox("vmm-said");
    let mut client = sleeper(&sandbox);
    client.wait_for_stdout("ready");
    let processes = leaks::processes(&sandbox.trace());
    let (pid, _) = processes.iter().find(|(_, command)| command.contains("sandbox-vmm")).expect("a VMM runs");
    kill(*pid, Signal::SIGKILL).unwrap();
    client.wait().expect_error(125, &["sandbox-vmm"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn the_caller_killed_at_any_moment() {
    let sandbox = sandbox("caller-killed");
    for moment in MOMENTS {
        let mut client = sleeper(&sandbox);
        std::thread::sleep(Duration::from_millis(moment));
        // The caller alone: what it started must notice.
        client.signal(Signal::SIGKILL);
        while client.running() {
            std::thread::sleep(Duration::from_millis(5));
        }
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_interrupt_goes_to_the_process() {
    let sandbox = sandbox("interrupt-once");
    let mut client =
        sandbox.spawn(["sh", "-c", "trap 'exit 9' INT; echo ready; while :; do sleep 0.1; done"]);
    client.wait_for_stdout("ready");
    // As a terminal does: to the whole foreground group.
    killpg(client.pid(), Signal::SIGINT).unwrap();
    client.wait().expect_code(9);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_second_interrupt_ends_the_sandbox() {
    let sandbox = sandbox("interrupt-twice");
    let mut client = sandbox.spawn(["sh", "-c", "trap '' INT; echo ready; while :; do sleep 1; done"]);
    client.wait_for_stdout("ready");
    killpg(client.pid(), Signal::SIGINT).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(client.running(), "the process ignores interrupts");
    killpg(client.pid(), Signal::SIGINT).unwrap();
    client.wait().expect_code(128 + 2);
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_interrupt_during_the_start_cuts_it_off() {
    let sandbox = sandbox("interrupt-start");
    for moment in [50, 300] {
        let client = sleeper(&sandbox);
        std::thread::sleep(Duration::from_millis(moment));
        killpg(client.pid(), Signal::SIGINT).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        // It may be past the start on a fast machine, where the first interrupt goes to `sleep`, which as process
        // 1 of its namespace ignores it.
        let _ = killpg(client.pid(), Signal::SIGINT);
        let outcome = client.wait();
        // Before it has its handlers, the signal itself ends it, which shells report alike.
        let code = outcome.code().or_else(|| outcome.status.signal().map(|signal| 128 + signal));
        assert_eq!(code, Some(128 + 2), "{outcome}");
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_terminated_caller_ends_a_process_that_does_not_care_by_a_second_signal() {
    let sandbox = sandbox("terminate");
    let mut client =
        sandbox.spawn(["sh", "-c", "trap 'exit 12' TERM; echo ready; while :; do sleep 0.1; done"]);
    client.wait_for_stdout("ready");
    client.signal(Signal::SIGTERM);
    client.wait().expect_code(12);
    sandbox.expect_clean_and_usable();
}
