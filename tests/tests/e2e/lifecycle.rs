//! The life of a container in the hands of an engine: `create`, `start`, `kill`, `state`, `delete`.

use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getsid};
use sandbox_tests::container::orphan_in;
use sandbox_tests::process::Process;
use sandbox_tests::terminal::ConsoleSocket;
use sandbox_tests::{leaks, sandbox};

#[test]
fn a_container_is_created_started_ends_and_is_deleted() {
    let sandbox =
        sandbox("life").command(["sh", "-c", "echo out; echo err >&2; read line; echo $line; exit 7"]);
    let mut container = sandbox.create();
    let shown = sandbox.shown();
    assert_eq!(shown["status"], "created", "{shown}");
    assert_eq!(shown["id"], *sandbox.id, "{shown}");
    assert_eq!(shown["pid"], container.monitor.pid().as_raw(), "{shown}");
    assert_eq!(shown["bundle"], *sandbox.bundle.path().to_str().unwrap(), "{shown}");
    assert_eq!(container.streams.so_far(), Default::default(), "nothing runs before the start");
    sandbox.on("start", []).expect_stdout("");
    container.wait_for_stdout("out\n");
    assert_eq!(sandbox.status(), "running");
    container.streams.write(b"in\n");
    assert_eq!(container.monitor.wait(), 7);
    let outcome = container.streams.wait();
    assert_eq!((outcome.out(), outcome.err()), ("out\nin\n".into(), "err\n".into()));
    let shown = sandbox.shown();
    assert_eq!((shown["status"].as_str(), shown["pid"].as_i64()), (Some("stopped"), Some(0)), "{shown}");
    sandbox.on("delete", []).expect_stdout("");
    sandbox.on("state", []).expect_error(1, &["container does not exist"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn the_process_of_the_pid_file_stands_for_the_container_and_survives_its_caller() {
    let sandbox = sandbox("stands").command([
        "sh",
        "-c",
        "trap 'exit 21' TERM; echo ready; while :; do sleep 0.1; done",
    ]);
    // A caller that is killed with everything of its own as soon as the container stands.
    let create = sandbox.create_command();
    let mut caller = std::process::Command::new("/bin/sh");
    caller
        .args(["-c", "\"$@\"; echo created; sleep 1000", "sh"])
        .arg(create.get_program())
        .args(create.get_args());
    caller.envs(create.get_envs().filter_map(|(name, value)| Some((name, value?)))).process_group(0);
    let mut caller = Process::spawn(&mut caller);
    caller.wait_for_stdout("created");
    let monitor = orphan_in(&sandbox.pid_file());
    killpg(caller.pid(), Signal::SIGKILL).unwrap();
    while caller.running() {}
    assert!(monitor.running());
    assert_eq!(getsid(Some(monitor.pid())).unwrap(), monitor.pid(), "it leads a session of its own");
    assert_ne!(getsid(Some(monitor.pid())).unwrap(), getsid(None::<Pid>).unwrap());
    sandbox.on("start", []).expect_code(0);
    caller.wait_alone();
    while !caller.so_far().0.contains("ready") {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(monitor.running());
    // What an engine sends to the process id is for the process in the guest.
    monitor.signal(Signal::SIGTERM);
    assert_eq!(monitor.wait(), 21);
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn a_descriptor_of_the_process_is_sent_to_whoever_asks() {
    let sandbox = sandbox("pidfd").command(["sleep", "1000"]);
    let path = sandbox.directory().join("pidfd");
    let sandbox = sandbox.option("--pidfd-socket", &path);
    sandbox.create_in_vain().expect_error(1, &["pidfd socket", path.to_str().unwrap()]);
    sandbox.expect_nothing_left();
    let socket = ConsoleSocket::listen(&path);
    let container = sandbox.start();
    // proc(5): what a descriptor of a process is of.
    let of = || {
        let (_, pidfd) = socket.receive_descriptor();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).expect("it is of a process");
        Pid::from_raw(pid.trim().parse().unwrap())
    };
    assert_eq!(of(), container.monitor.pid());
    let pid_file = sandbox.directory().join("exec-pid");
    let options =
        ["--detach", "--pidfd-socket", path.to_str().unwrap(), "--pid-file", pid_file.to_str().unwrap()];
    sandbox.exec(&options, ["true"]).expect_code(0);
    let holder = orphan_in(&pid_file);
    assert_eq!(of(), holder.pid());
    assert_eq!(holder.wait(), 0);
    container.end();
}

#[test]
fn kill_takes_names_and_numbers() {
    let traps = "for s in HUP USR1 USR2 TERM; do trap \"echo got-$s\" $s; done; echo ready; while :; do sleep 0.1; done";
    let sandbox = sandbox("kill").command(["sh", "-c", traps]);
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    for (signal, seen) in
        [("HUP", "got-HUP"), ("SIGUSR1", "got-USR1"), ("12", "got-USR2"), ("term", "got-TERM")]
    {
        sandbox.on("kill", [signal]).expect_stdout("");
        container.wait_for_stdout(seen);
    }
    // No signal at all: whether it could be sent.
    sandbox.on("kill", ["0"]).expect_code(0);
    sandbox.on("kill", ["--all", "0"]).expect_code(0);
    assert!(container.monitor.running());
    sandbox.on("kill", ["9"]).expect_code(0);
    assert_eq!(container.monitor.wait(), 137);
    for signal in ["9", "0"] {
        sandbox.on("kill", [signal]).expect_error(1, &["container not running"]);
    }
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn kill_without_a_signal_is_term_and_all_reaches_every_process() {
    // Process 1 shares its namespace with another one, which only --all reaches.
    let script = "(trap 'echo child-got-it' TERM; echo child; while :; do sleep 0.1; done) & \
                  trap 'echo first-got-it' TERM; echo ready; while :; do sleep 0.1; done";
    let sandbox = sandbox("kill-all").command(["sh", "-c", script]);
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    container.wait_for_stdout("child");
    sandbox.on("kill", []).expect_code(0);
    container.wait_for_stdout("first-got-it");
    assert!(!container.streams.so_far().0.contains("child-got-it"));
    sandbox.on("kill", ["--all", "TERM"]).expect_code(0);
    container.wait_for_stdout("child-got-it");
    sandbox.on("kill", ["--all", "KILL"]).expect_code(0);
    assert_eq!(container.monitor.wait(), 137);
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn a_created_container_can_be_killed_and_cannot_be_started_then() {
    let sandbox = sandbox("kill-created").command(["echo", "never"]);
    let container = sandbox.create();
    sandbox.on("kill", ["KILL"]).expect_code(0);
    assert_eq!(container.monitor.wait(), 137);
    assert_eq!(sandbox.status(), "stopped");
    sandbox.on("start", []).expect_error(1, &["stopped"]);
    assert_eq!(container.streams.wait().out(), "");
    sandbox.on("delete", []).expect_code(0);
    sandbox.expect_clean_and_usable();
}

#[test]
fn delete_takes_the_created_and_the_stopped_and_refuses_the_running() {
    let sandbox = sandbox("delete").command(["sleep", "1000"]);
    let container = sandbox.create();
    sandbox.on("delete", []).expect_stdout("");
    assert_eq!(container.monitor.wait(), 137);
    sandbox.expect_nothing_left();
    let container = sandbox.start();
    let words = format!("cannot delete container {} that is not stopped: running", sandbox.id);
    sandbox.on("delete", []).expect_error(1, &[&words]);
    assert!(container.monitor.running());
    container.end();
    sandbox.expect_nothing_left();
}

#[test]
fn delete_force_takes_everything_and_does_not_mind_what_does_not_exist() {
    let sandbox = sandbox("force").command(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
    let container = sandbox.start();
    sandbox.on("delete", ["--force"]).expect_stdout("");
    assert_eq!(container.monitor.wait(), 137);
    sandbox.expect_nothing_left();
    sandbox.on("delete", ["--force"]).expect_stdout("");
    sandbox.on("delete", []).expect_error(1, &["container does not exist"]);
    sandbox.create();
    sandbox.on("delete", ["--force"]).expect_stdout("");
    sandbox.expect_clean_and_usable();
}

#[test]
fn run_detach_returns_when_the_process_runs() {
    let sandbox = sandbox("detach").flag("--detach");
    let pid_file = sandbox.pid_file();
    let sandbox = sandbox.option("--pid-file", pid_file);
    sandbox_tests::orphan::become_subreaper();
    let mut run = sandbox.spawn(["sh", "-c", "echo ready; exec >&- 2>&-; read line; exit $line"]);
    run.wait_alone().expect_code(0);
    let monitor = orphan_in(&sandbox.pid_file());
    // Whoever reads it learns that there will be no more.
    run.wait_for_end_of_output();
    assert_eq!(sandbox.status(), "running");
    run.write(b"5\n");
    assert_eq!(monitor.wait(), 5);
    run.wait().expect_stdout("ready\n");
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn a_state_root_may_be_longer_than_the_path_of_a_socket() {
    // Docker's is: a directory of its own, and an id of 64 digits.
    let deep = format!("{0}/{0}", "x".repeat(100));
    let sandbox = sandbox("deep").command(["sleep", "1000"]).deep_state(&deep);
    let container = sandbox.start();
    sandbox.exec(&[], ["echo", "deep"]).expect_stdout("deep\n");
    sandbox.on("events", ["--stats"]).expect_code(0);
    container.end();
    assert_eq!(std::fs::read_dir(sandbox.state()).unwrap().count(), 0);
    std::fs::remove_dir_all(sandbox.state().parent().unwrap()).unwrap();
}

#[test]
fn list_shows_the_created_the_running_and_the_stopped() {
    let sandbox = sandbox("list-verbs").command(["sh", "-c", "read line"]);
    let status = |words: &[&str]| {
        let listed = sandbox.verb(["list"].iter().chain(words)).expect_code(0);
        let line = listed.out().lines().find(|line| line.contains(&sandbox.id)).map(str::to_owned);
        line.unwrap_or_else(|| panic!("it is not listed\n{listed}"))
    };
    let mut container = sandbox.create();
    let columns = sandbox.verb(["list"]).out();
    let columns: Vec<&str> = columns.lines().next().expect("a header").split_whitespace().collect();
    assert_eq!(columns, ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "MACHINE"]);
    assert!(status(&[]).contains("created"));
    sandbox.on("start", []).expect_code(0);
    assert!(status(&[]).contains("running"));
    container.streams.close_stdin();
    assert_eq!(container.monitor.wait(), 1);
    assert!(status(&[]).contains("stopped"));
    assert!(status(&["--format", "json"]).contains("\"stopped\""));
    assert_eq!(status(&["--quiet"]), sandbox.id);
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn two_creates_of_one_id_have_one_winner() {
    let sandbox = sandbox("race").command(["sleep", "1000"]);
    let mut both = [(), ()].map(|()| Process::spawn(&mut sandbox.create_command()));
    let outcomes = both.each_mut().map(Process::wait_alone);
    let won = outcomes.iter().filter(|outcome| outcome.code() == Some(0)).count();
    assert_eq!(won, 1, "{}{}", outcomes[0], outcomes[1]);
    let lost = outcomes.into_iter().find(|outcome| outcome.code() != Some(0)).unwrap();
    lost.expect_error(1, &["container with id exists"]);
    assert_eq!(sandbox.status(), "created");
    sandbox.on("start", []).expect_code(0);
    sandbox.create_in_vain().expect_error(1, &["container with id exists"]);
    sandbox.on("delete", ["--force"]).expect_code(0);
}

#[test]
fn other_commands_see_a_container_that_is_being_created() {
    let sandbox = sandbox("young").command(["sleep", "1000"]);
    let mut create = Process::spawn(&mut sandbox.create_command());
    let mut seen = vec![];
    while create.running() {
        let state = sandbox.on("state", []);
        match state.code() {
            Some(0) => seen.push(sandbox.status()),
            // Before there is a record.
            _ => drop(state.expect_error(1, &["container does not exist"])),
        }
        seen.dedup();
    }
    assert!(["creating", "created"].iter().any(|first| seen.first().is_some_and(|s| s == first)), "{seen:?}");
    sandbox.on("delete", ["--force"]).expect_code(0);
}

#[test]
fn a_container_that_is_being_created_can_be_deleted_by_force() {
    let sandbox = sandbox("young-deleted").command(["sleep", "1000"]);
    let create = Process::spawn(&mut sandbox.create_command());
    while sandbox.on("state", []).code() != Some(0) {}
    sandbox.on("delete", ["--force"]).expect_code(0);
    let outcome = create.wait();
    assert!(!outcome.err().contains("panicked"), "{outcome}");
    sandbox.expect_clean_and_usable();
}

#[test]
fn fifty_lives_leave_nothing() {
    let sandbox = sandbox("fifty").command(["true"]);
    let cgroup = format!("/{}", sandbox.id);
    let sandbox = sandbox.config(|config| config["linux"]["cgroupsPath"] = cgroup.into());
    for _ in 0..50 {
        let container = sandbox.start();
        assert_eq!(container.monitor.wait(), 0);
        sandbox.on("delete", []).expect_code(0);
    }
    assert_eq!(leaks::processes(&sandbox.trace()), []);
    sandbox.expect_nothing_left();
}
