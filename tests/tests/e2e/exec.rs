//! `sandbox exec`: one more process in a running container.

use std::fs;

use nix::sys::signal::Signal;
use sandbox_tests::container::orphan_in;
use sandbox_tests::process::Process;
use sandbox_tests::{Container, Sandbox, sandbox};
use serde_json::json;

/// A container that stays until it is killed.
fn idle(name: &str) -> Sandbox {
    sandbox(name).command(["sleep", "1000"])
}

/// Waits until the container has no process with this in its command line.
fn wait_until_gone(sandbox: &Sandbox, command: &str) {
    while sandbox.on("ps", []).expect_code(0).out().contains(command) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// `sandbox exec --detach`; the process that stands for the new one on the host.
fn detached(sandbox: &Sandbox, options: &[&str], script: &str) -> (Process, sandbox_tests::orphan::Orphan) {
    let pid_file = sandbox.directory().join("exec-pid");
    let mut words = vec!["--detach", "--pid-file", pid_file.to_str().unwrap()];
    words.extend(options);
    let mut exec = Process::spawn(&mut sandbox.exec_command(&words, ["sh", "-c", script]));
    exec.wait_alone().expect_code(0);
    (exec, orphan_in(&pid_file))
}

fn end(container: Container<'_>) {
    container.end();
}

#[test]
fn its_exit_code_and_its_streams_are_its_own() {
    let sandbox = idle("exec");
    let container = sandbox.start();
    let outcome = sandbox.exec(&[], ["sh", "-c", "echo out; echo err >&2; exit 9"]).expect_code(9);
    assert_eq!((outcome.out(), outcome.err()), ("out\n".into(), "err\n".into()));
    sandbox.exec(&[], ["sh", "-c", "kill -USR1 $$"]).expect_code(128 + 10);
    let mut sort = Process::spawn(&mut sandbox.exec_command(&[], ["sort"]));
    sort.write(b"b\na\n");
    sort.wait().expect_stdout("a\nb\n");
    // What is nothing outside is nothing inside.
    let mut null = sandbox.exec_command(&[], ["stat", "-L", "-c", "%F %t:%T", "/proc/self/fd/0"]);
    let output = null.stdin(std::process::Stdio::null()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "character special file 1:3\n");
    // Many bytes, none lost, and no process of the container's is in another's way.
    let outcome = sandbox.exec(&[], ["seq", "1", "200000"]).expect_code(0);
    assert_eq!(outcome.out().lines().count(), 200_000);
    assert_eq!(container.streams.so_far(), Default::default());
    sandbox.exec(&[], ["no-such-program"]).expect_error(255, &["no-such-program", "not found"]);
    end(container);
}

#[test]
fn the_command_line_changes_the_container_s_process() {
    let sandbox = idle("exec-flags");
    let container = sandbox.start();
    sandbox.exec(&["--cwd", "/var/tmp"], ["pwd"]).expect_stdout("/var/tmp\n");
    sandbox.exec(&["--env", "A=1", "-e", "B=2 3"], ["sh", "-c", "echo $A $B"]).expect_stdout("1 2 3\n");
    let ids = "echo $(id -u) $(id -g) $(id -G)";
    sandbox
        .exec(&["--user", "1000:2000", "-g", "3000"], ["sh", "-c", ids])
        .expect_stdout("1000 2000 2000 3000\n");
    let effective = ["sh", "-c", "grep CapEff /proc/self/status"];
    let without = sandbox.exec(&[], effective).expect_code(0).out();
    let with = sandbox.exec(&["--cap", "CAP_SYS_ADMIN"], effective).expect_code(0).out();
    let bits = |text: &str| u64::from_str_radix(text.split_whitespace().last().unwrap(), 16).unwrap();
    assert_eq!(bits(&without) & 1 << 21, 0, "{without}");
    assert_eq!(bits(&with), bits(&without) | 1 << 21, "{with}");
    let privileges = ["sh", "-c", "grep NoNewPrivs /proc/self/status"];
    sandbox.exec(&["--no-new-privs"], privileges).expect_line("NoNewPrivs:\t1");
    end(container);
}

#[test]
fn a_process_file_says_all_of_it() {
    let sandbox = idle("exec-file");
    let container = sandbox.start();
    let file = sandbox.directory().join("process.json");
    let process = json!({
        "args": ["sh", "-c", "echo $(id -u) $(pwd) $ONLY; exit 4"],
        "env": ["PATH=/bin", "ONLY=this"],
        "cwd": "/tmp",
        "user": {"uid": 1000, "gid": 1000},
    });
    fs::write(&file, process.to_string()).unwrap();
    let outcome =
        Process::spawn(&mut sandbox.exec_command(&["--process", file.to_str().unwrap()], [""; 0])).wait();
    assert_eq!(outcome.clone().expect_code(4).out(), "1000 /tmp this\n", "{outcome}");
    end(container);
}

#[test]
fn a_signal_to_the_command_goes_to_the_process() {
    let sandbox = idle("exec-signal");
    let container = sandbox.start();
    let script = "trap 'echo got-it; exit 6' TERM; echo ready; while :; do sleep 0.1; done";
    let mut exec = Process::spawn(&mut sandbox.exec_command(&[], ["sh", "-c", script]));
    exec.wait_for_stdout("ready");
    exec.signal(Signal::SIGTERM);
    exec.wait().expect_code(6);
    end(container);
}

#[test]
fn a_detached_one_has_a_holder_that_ends_as_it_does() {
    let sandbox = idle("exec-detach");
    let container = sandbox.start();
    let (mut exec, holder) = detached(&sandbox, &[], "echo ready; read line; exit $line");
    assert!(holder.running());
    exec.write(b"13\n");
    assert_eq!(holder.wait(), 13);
    exec.wait().expect_stdout("ready\n");
    end(container);
}

#[test]
fn a_signal_to_the_holder_goes_to_the_process_and_its_death_kills_it() {
    let sandbox = idle("exec-holder");
    let container = sandbox.start();
    let script = "trap 'echo got-it; exit 6' TERM; echo ready; while :; do sleep 0.1; done";
    let (exec, holder) = detached(&sandbox, &[], script);
    while !exec.so_far().0.contains("ready") {}
    holder.signal(Signal::SIGTERM);
    assert_eq!(holder.wait(), 6);
    exec.wait().expect_stdout("ready\ngot-it\n");
    let (_exec, holder) = detached(&sandbox, &[], "exec sleep 4321");
    assert!(sandbox.on("ps", []).expect_code(0).out().contains("sleep 4321"));
    holder.signal(Signal::SIGKILL);
    assert_eq!(holder.wait(), 137);
    wait_until_gone(&sandbox, "sleep 4321");
    end(container);
}

#[test]
fn an_attached_one_dies_with_its_command() {
    let sandbox = idle("exec-killed");
    let container = sandbox.start();
    let mut exec =
        Process::spawn(&mut sandbox.exec_command(&[], ["sh", "-c", "echo ready; exec sleep 4321"]));
    exec.wait_for_stdout("ready");
    exec.signal(Signal::SIGKILL);
    wait_until_gone(&sandbox, "sleep 4321");
    end(container);
}

#[test]
fn the_end_of_the_container_is_the_end_of_its_processes() {
    let sandbox = idle("exec-end");
    let container = sandbox.start();
    let (_exec, holder) = detached(&sandbox, &[], "exec sleep 4321");
    container.end();
    assert_ne!(holder.wait(), 0);
    sandbox.expect_nothing_left();
}

/// As a first process does that is to be the manager of cgroups, such as systemd.
#[test]
fn the_first_process_gives_its_cgroups_controllers_whatever_was_added_before() {
    let script = "cd /sys/fs/cgroup && mkdir inner && echo 0 >inner/cgroup.procs && touch /moved
        while ! [ -e /added ]; do sleep 0.1; done
        echo +pids >cgroup.subtree_control && touch /given; exec sleep 1000";
    let sandbox = sandbox("exec-cgroups").command(["sh", "-c", script]).writable_cgroups();
    let container = sandbox.start();
    sandbox.exec(&[], ["sh", "-c", "while ! [ -e /moved ]; do sleep 0.1; done"]).expect_code(0);
    let (_exec, _holder) = detached(&sandbox, &[], "exec sleep 4321");
    sandbox.exec(&[], ["cat", "/proc/self/cgroup"]).expect_stdout("0::/inner\n");
    let script = "touch /added; while ! [ -e /given ]; do sleep 0.1; done; cat /proc/self/cgroup";
    sandbox.exec(&[], ["sh", "-c", script]).expect_stdout("0::/inner\n");
    end(container);
}

#[test]
fn many_at_once_do_not_mix() {
    let sandbox = idle("exec-many");
    let container = sandbox.start();
    let execs: Vec<_> = (0..20)
        .map(|n| {
            let script = format!("for i in 1 2 3 4 5; do echo {n}-$i; done; exit {n}");
            Process::spawn(&mut sandbox.exec_command(&[], ["sh", "-c", &script]))
        })
        .collect();
    for (n, exec) in execs.into_iter().enumerate() {
        let outcome = exec.wait().expect_code(i32::try_from(n).unwrap());
        assert_eq!(outcome.out(), [1, 2, 3, 4, 5].map(|i| format!("{n}-{i}\n")).concat());
    }
    end(container);
}
