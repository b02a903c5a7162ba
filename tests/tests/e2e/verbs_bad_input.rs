//! The verbs of engines with bad input: the words that engines look for, and nothing left behind.

use std::fs;

use nix::sys::signal::{Signal, kill};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sandbox_tests::place::skip;
use sandbox_tests::process::Process;
use sandbox_tests::{Sandbox, leaks, sandbox};
use serde_json::json;

/// Every verb that is about a container, with what it needs besides.
const VERBS: [(&str, &[&str]); 11] = [
    ("start", &[]),
    ("state", &[]),
    ("kill", &["KILL"]),
    ("delete", &[]),
    ("exec", &["true"]),
    ("ps", &[]),
    ("pause", &[]),
    ("resume", &[]),
    ("update", &["--memory", "64M"]),
    ("events", &["--stats"]),
    ("events", &[]),
];

/// The exit code of a verb that fails.
fn failure_of(verb: &str) -> i32 {
    if verb == "exec" { 255 } else { 1 }
}

fn sleeper(name: &str) -> Sandbox {
    sandbox(name).command(["sleep", "1000"])
}

#[test]
fn ids_that_are_unknown_or_no_ids() {
    let sandbox = sleeper("ids");
    let long = "x".repeat(1000);
    for (verb, more) in VERBS {
        let on = |id: &str| sandbox.verb([verb, id].iter().chain(more));
        on("unknown").expect_error(failure_of(verb), &["container does not exist", "unknown"]);
        for id in ["a/b", "../a", "..", "", &long] {
            let outcome = on(id);
            assert_ne!(outcome.code(), Some(0), "{verb} {id}: {outcome}");
            assert!(outcome.err().contains("id"), "{verb} {id}: {outcome}");
        }
    }
    sandbox.verb(["kill"]).expect_error(2, &["ID"]);
    sandbox.on("kill", ["FROB"]).expect_error(1, &["FROB"]);
    sandbox.expect_nothing_left();
}

#[test]
fn every_verb_in_every_wrong_state() {
    let sandbox = sleeper("wrong-state");
    let fails = |verb: &str, more: &[&str], words: &str| {
        let outcome = sandbox.verb([verb, &sandbox.id].iter().chain(more));
        outcome.expect_error(failure_of(verb), &[words]);
    };
    let container = sandbox.create();
    fails("exec", &["true"], "container not running");
    fails("pause", &[], "container not running");
    fails("resume", &[], "container not paused");
    sandbox.on("start", []).expect_code(0);
    fails("start", &[], "cannot start an already running container");
    fails("resume", &[], "container not paused");
    fails("delete", &[], "that is not stopped: running");
    sandbox.on("pause", []).expect_code(0);
    fails("start", &[], "cannot start a container that is paused");
    fails("pause", &[], "container not running");
    fails("exec", &["true"], "cannot exec in a paused container");
    fails("delete", &[], "that is not stopped: paused");
    sandbox.on("kill", ["KILL"]).expect_code(0);
    assert_eq!(container.monitor.wait(), 137);
    fails("start", &[], "cannot start a container that has stopped");
    fails("exec", &["true"], "cannot exec in a stopped container");
    fails("pause", &[], "container not running");
    fails("resume", &[], "container not paused");
    for (verb, more) in
        [("kill", &["KILL"][..]), ("ps", &[]), ("update", &["--memory", "64M"]), ("events", &["--stats"])]
    {
        fails(verb, more, "container not running");
    }
    sandbox.create_in_vain().expect_error(1, &["container with id exists"]);
    sandbox.on("delete", []).expect_code(0);
    sandbox.expect_clean_and_usable();
}

#[test]
fn process_files_that_are_no_processes() {
    let sandbox = sleeper("bad-process");
    let container = sandbox.start();
    let file = sandbox.directory().join("process.json");
    let exec = || {
        let words = ["--process", file.to_str().unwrap()];
        Process::spawn(&mut sandbox.exec_command(&words, [""; 0])).wait()
    };
    exec().expect_error(255, &["process.json", "No such file"]);
    for (text, words) in [
        ("{", "process.json"),
        ("[]", "process"),
        (r#"{"args": ["true"]}"#, "cwd"),
        (r#"{"args": [], "cwd": "/"}"#, "process.args"),
        (r#"{"args": ["true"], "cwd": "x"}"#, "process.cwd"),
        (r#"{"args": ["true"], "cwd": "/", "frob": 1}"#, "process.frob"),
        (r#"{"args": ["true"], "cwd": "/", "commandLine": "x"}"#, "process.commandLine"),
        (r#"{"args": ["true"], "cwd": "/no/such/place"}"#, "/no/such/place"),
    ] {
        fs::write(&file, text).unwrap();
        exec().expect_error(255, &[words]);
    }
    for words in [&["--user", "frob"][..], &["--cap", "CAP_FROB"], &["--preserve-fds", "1"], &["--cwd", "x"]]
    {
        let outcome = Process::spawn(&mut sandbox.exec_command(words, ["true"])).wait();
        assert!(matches!(outcome.code(), Some(255 | 2)), "{outcome}");
    }
    assert_eq!(
        sandbox.on("ps", []).expect_code(0).out().lines().count(),
        2,
        "a header and the first process"
    );
    container.end();
}

#[test]
fn a_pid_file_that_cannot_be_written() {
    let sandbox = sleeper("pid-file");
    let nowhere = sandbox.directory().join("no/such/directory/pid");
    let mut create = sandbox.verb_command(["create", "--machine", &sandbox_tests::place::machine()]);
    create.arg("--bundle").arg(sandbox.bundle.path()).arg("--pid-file").arg(&nowhere).arg(&sandbox.id);
    Process::spawn(&mut create).wait().expect_error(1, &["no/such/directory"]);
    sandbox.expect_nothing_left();
    let container = sandbox.start();
    for detach in [&["--detach"][..], &[]] {
        let words = [&["--pid-file", nowhere.to_str().unwrap()], detach].concat();
        let exec = Process::spawn(&mut sandbox.exec_command(&words, ["sleep", "4321"])).wait();
        exec.expect_error(255, &["no/such/directory"]);
        while sandbox.on("ps", []).expect_code(0).out().contains("4321") {}
    }
    container.end();
}

#[test]
fn a_state_file_that_somebody_has_damaged() {
    let sandbox = sleeper("damaged");
    let path = sandbox.state().join(&sandbox.id).join("state.json");
    let other = sandbox_tests::sandbox("unharmed").command(["sleep", "1000"]);
    for alive in [true, false] {
        for text in ["", "{", "{\"id\": 1}", "\0\0\0"] {
            let container = sandbox.start();
            if !alive {
                container.monitor.signal(Signal::SIGKILL);
                assert_eq!(container.monitor.wait(), 137);
            }
            fs::write(&path, text).unwrap();
            sandbox.on("state", []).expect_error(1, &["state.json", "damaged", "delete --force"]);
            sandbox.on("delete", []).expect_error(1, &["state.json", "damaged"]);
            let listed = sandbox.verb(["list"]).expect_code(0);
            assert!(listed.err().contains("damaged"), "{listed}");
            sandbox.create_in_vain().expect_error(1, &["container with id exists"]);
            let deleted = sandbox.on("delete", ["--force"]).expect_code(0);
            assert!(deleted.err().contains("damaged"), "it says what it met\n{deleted}");
            if alive {
                assert_eq!(container.monitor.wait(), 137);
            }
            sandbox.expect_nothing_left();
        }
    }
    drop(other);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_state_directory_that_somebody_has_damaged_is_deleted_by_force_all_the_same() {
    let sandbox = sleeper("torn");
    let directory = sandbox.state().join(&sandbox.id);
    let record = directory.join("state.json");
    let socket = directory.join("monitor.sock");
    let damages: [(&str, &dyn Fn()); 6] = [
        ("no record", &|| fs::remove_file(&record).unwrap()),
        ("a directory for a record", &|| {
            fs::remove_file(&record).unwrap();
            fs::create_dir(&record).unwrap();
        }),
        ("a pipe for a record", &|| {
            fs::remove_file(&record).unwrap();
            nix::unistd::mkfifo(&record, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }),
        ("a link for a record", &|| {
            fs::remove_file(&record).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", &record).unwrap();
        }),
        ("no socket", &|| fs::remove_file(&socket).unwrap()),
        ("no sockets of the machine", &|| fs::remove_dir_all(directory.join("vsock")).unwrap()),
    ];
    for (what, damage) in damages {
        let container = sandbox.start();
        damage();
        for (verb, more) in VERBS.into_iter().filter(|(verb, more)| !more.is_empty() || *verb == "state") {
            let outcome = sandbox.verb([verb, &sandbox.id].iter().chain(more));
            assert!(!outcome.err().contains("panicked"), "{what}: {outcome}");
        }
        let deleted = sandbox.on("delete", ["--force"]);
        assert_eq!(deleted.code(), Some(0), "{what}: {deleted}");
        assert_eq!(container.monitor.wait(), 137, "{what}");
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_monitor_killed_in_the_middle_of_each_verb() {
    let sandbox = sleeper("verb-killed");
    for (verb, more) in VERBS {
        let container = sandbox.create();
        if verb != "start" {
            sandbox.on("start", []).expect_code(0);
        }
        if verb == "resume" {
            sandbox.on("pause", []).expect_code(0);
        }
        let processes = leaks::processes(&sandbox.trace());
        let (monitor, _) =
            processes.iter().find(|(_, command)| command.contains(" monitor ")).expect("a monitor");
        // It takes no request any more, and whoever makes one waits.
        kill(*monitor, Signal::SIGSTOP).unwrap();
        let asking = Process::spawn(&mut sandbox.verb_command([verb, &sandbox.id].iter().chain(more)));
        std::thread::sleep(std::time::Duration::from_millis(200));
        kill(*monitor, Signal::SIGKILL).unwrap();
        let outcome = asking.wait();
        assert!(!outcome.err().contains("panicked"), "{outcome}");
        if verb != "state" {
            outcome.expect_error(failure_of(verb), &["s"]);
        }
        container.monitor.wait();
        sandbox.wait_for_status("stopped");
        sandbox.on("delete", []).expect_code(0);
        sandbox.expect_nothing_left();
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn hooks_that_fail_hang_or_are_missing_in_the_hands_of_an_engine() {
    let sandbox = sleeper("verb-hooks");
    let good = sandbox.bundle.config();
    let script = |text: &str, timeout: u32| json!([{"path": "/bin/sh", "args": ["sh", "-c", text], "timeout": timeout}]);
    let with = |hooks: serde_json::Value| {
        let mut config = good.clone();
        config["hooks"] = hooks;
        sandbox.bundle.write(&config);
    };
    for (hook, words) in [
        (script("echo broken >&2; exit 3", 20), "broken"),
        (script("exec sleep 1000", 1), "timeout of 1s"),
        (json!([{"path": "/no/such/hook"}]), "/no/such/hook"),
    ] {
        for point in ["prestart", "createRuntime"] {
            with(json!({ point: hook }));
            // That of the round before.
            let _ = fs::remove_file(sandbox.pid_file());
            sandbox.create_in_vain().expect_error(1, &[words]);
            assert!(!sandbox.pid_file().exists());
            sandbox.expect_nothing_left();
        }
        // Too late for an error: the container goes on, and goes.
        with(json!({"poststart": hook, "poststop": hook}));
        let container = sandbox.create();
        let started = sandbox.on("start", []).expect_code(0);
        assert!(started.err().contains("poststart") && started.err().contains(words), "{started}");
        assert_eq!(sandbox.status(), "running");
        sandbox.on("kill", ["KILL"]).expect_code(0);
        assert_eq!(container.monitor.wait(), 137);
        let deleted = sandbox.on("delete", []).expect_code(0);
        assert!(deleted.err().contains("poststop") && deleted.err().contains(words), "{deleted}");
        sandbox.expect_nothing_left();
    }
    sandbox.bundle.write(&good);
    sandbox.expect_clean_and_usable();
}

#[test]
fn bundles_consoles_and_logs_that_are_not_there() {
    let sandbox = sleeper("not-there");
    let nowhere = sandbox.directory().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    let create = |words: &[&str]| sandbox.verb(["create"].iter().chain(words).chain([&sandbox.id.as_str()]));
    create(&["--bundle", nowhere]).expect_error(1, &["nowhere"]);
    let empty = sandbox.directory().join("empty");
    fs::create_dir(&empty).unwrap();
    create(&["--bundle", empty.to_str().unwrap()]).expect_error(1, &["config.json"]);
    fs::write(empty.join("config.json"), "{").unwrap();
    create(&["--bundle", empty.to_str().unwrap()]).expect_error(1, &["config.json"]);
    let log = format!("{nowhere}/log");
    create(&["--log", &log, "--bundle", sandbox.bundle.path().to_str().unwrap()]).expect_error(1, &[&log]);
    create(&["--preserve-fds", "2", "--bundle", sandbox.bundle.path().to_str().unwrap()])
        .expect_error(1, &["--preserve-fds"]);
    // A file where a socket is meant.
    let file = empty.join("config.json");
    let sandbox = sandbox
        .config(|config| config["process"]["terminal"] = true.into())
        .option("--console-socket", file.clone());
    sandbox.create_in_vain().expect_error(1, &["console socket", file.to_str().unwrap()]);
    sandbox.expect_nothing_left();
}

#[test]
fn cgroups_by_way_of_systemd_are_refused_with_the_remedy_where_there_is_none() {
    if std::path::Path::new("/run/systemd/system").exists() {
        return skip("systemd", "systemd runs on this host");
    }
    let sandbox = sandbox("systemd").config(|config| {
        config["linux"]["cgroupsPath"] = "machine.slice:sandbox:name".into();
    });
    let create = ["create", "--bundle", sandbox.bundle.path().to_str().unwrap(), &sandbox.id];
    for words in [&["--systemd-cgroup"][..], &["--cgroup-manager", "systemd"]] {
        let outcome = sandbox.verb(words.iter().chain(&create));
        outcome.expect_error(1, &["--systemd-cgroup", "does not run on this host", "cgroupfs"]);
    }
    sandbox.expect_nothing_left();
}

#[test]
fn a_file_of_somebody_else_in_the_state_directory_is_not_removed() {
    let sandbox = sleeper("foreign");
    let container = sandbox.start();
    let letter = sandbox.state().join(&sandbox.id).join("letter");
    sandbox.on("kill", ["KILL"]).expect_code(0);
    assert_eq!(container.monitor.wait(), 137);
    fs::write(&letter, "").unwrap();
    sandbox.on("delete", []).expect_error(1, &[&sandbox.id, "is in the way"]);
    assert!(letter.exists());
    fs::remove_file(letter).unwrap();
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn a_state_root_on_a_full_disk() {
    let sandbox = sleeper("full-verbs");
    let state = sandbox.state();
    mount("tmpfs", &state, "tmpfs", MountFlags::empty(), Some(c"size=64k,mode=700"))
        .expect("the tests run as root");
    let filler = state.join("filler");
    let fill = || {
        let mut size = 64 << 10;
        while fs::write(&filler, vec![1; size]).is_err() {
            size -= 512;
        }
        let _ = fs::write(state.join("filler2"), vec![1; 4096]);
    };
    fill();
    let created = sandbox.create_in_vain();
    let _ = fs::remove_file(&filler);
    let container = sandbox.create();
    sandbox.on("start", []).expect_code(0);
    fill();
    // The end needs no room.
    let status = sandbox.status();
    let killed = sandbox.on("kill", ["KILL"]);
    let code = container.monitor.wait();
    let stopped = sandbox.status();
    let deleted = sandbox.on("delete", []);
    let _ = unmount(&state, UnmountFlags::DETACH);
    created.expect_error(1, &["No space left", state.to_str().unwrap()]);
    killed.expect_code(0);
    deleted.expect_code(0);
    assert_eq!((status.as_str(), code, stopped.as_str()), ("running", 137, "stopped"));
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_configuration_that_cannot_be_run_is_refused_by_create() {
    let sandbox = sleeper("bad-create");
    let good = sandbox.bundle.config();
    for (pointer, value, words) in [
        ("/process/commandLine", json!("x"), "process.commandLine"),
        ("/process/args", json!([]), "process.args"),
        ("/root/path", json!("nowhere"), "root.path"),
        ("/process/cwd", json!("/bin/sh"), "/bin/sh"),
    ] {
        let mut config = good.clone();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[name] = value;
        sandbox.bundle.write(&config);
        sandbox.create_in_vain().expect_error(1, &[words]);
        sandbox.expect_nothing_left();
    }
    sandbox.bundle.write(&good);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_program_that_does_not_exist_is_an_error_of_start() {
    let sandbox = sandbox("no-program").command(["no-such-program"]);
    let mut create = Process::spawn(&mut sandbox.create_command());
    let created = create.wait_alone();
    if created.code() == Some(0) {
        sandbox.on("start", []).expect_error(1, &["no-such-program", "not found"]);
        sandbox.wait_for_status("stopped");
        sandbox.on("delete", []).expect_code(0);
    } else {
        created.expect_error(1, &["no-such-program", "not found"]);
    }
    sandbox.expect_clean_and_usable();
}
