//! `hooks.startContainer`: programs that run in the container when it is started, before its own.

use std::fs;
use std::process::{Command, Stdio};

use sandbox_tests::place::{binary, machine};
use sandbox_tests::sandbox::MARK;
use sandbox_tests::{Sandbox, sandbox};
use serde_json::{Value, json};

/// The exit code of the runtime's own errors.
const ERROR: i32 = 125;

fn with_hooks(name: &str, hooks: Value) -> Sandbox {
    sandbox(name).config(|config| config["hooks"]["startContainer"] = hooks)
}

fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "WORD=a=b"]})
}

#[test]
fn they_run_in_order_in_the_container_before_its_program() {
    let first = shell(
        "cat >/scratch/state; echo first $WORD $HOME $(id -u) $(hostname) >>/scratch/order; echo unseen",
    );
    let second = shell("read state; echo second ${#state} >>/scratch/order; sleep 1000 &");
    let sandbox = with_hooks("hooks", json!([first, second])).config(|config| {
        config["hostname"] = "a-host".into();
        config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    });
    let sandbox = sandbox.mount("/scratch", "tmpfs", "tmpfs", &["mode=1777"]);
    let outcome = sandbox.run(["sh", "-c", "cat /scratch/order /scratch/state"]);
    let out = outcome.out();
    let [first, second, state] = out.lines().take(3).collect::<Vec<_>>()[..] else { panic!("{outcome}") };
    assert_eq!((first, second), ("first a=b 1000 a-host", format!("second {}", state.len()).as_str()));
    let state: Value = serde_json::from_str(state).unwrap();
    let version = &sandbox.bundle.config()["ociVersion"];
    let expected =
        json!({"ociVersion": version, "id": sandbox.id, "status": "created", "pid": 1, "bundle": ""});
    assert_eq!(state, expected);
}

#[test]
fn they_run_under_a_filter_and_with_a_terminal_too() {
    for no_new_privileges in [true, false] {
        let sandbox =
            with_hooks("hooks-filter", json!([shell("mkdir /tmp/a; echo done >/tmp/b")])).config(|config| {
                config["process"]["noNewPrivileges"] = no_new_privileges.into();
                config["process"]["terminal"] = true.into();
                config["linux"]["seccomp"] = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
                });
            });
        let mut terminal = sandbox.terminal((80, 24), ["sh", "-c", "cat /tmp/b; ls -d /tmp/a; echo end"]);
        terminal.wait_for("done");
        terminal.wait_for(if no_new_privileges { "/tmp/a\r" } else { "No such file" });
        terminal.wait_for("end");
        assert_eq!(terminal.wait(), 0);
    }
}

#[test]
fn a_failure_is_a_failure_of_the_start() {
    let sandbox = sandbox("bad-hooks");
    let mut hanging = shell("echo so far; sleep 1000");
    hanging["timeout"] = 1.into();
    for (hooks, words) in [
        (
            json!([shell("true"), shell("echo it is broken >&2; exit 7")]),
            ["hooks.startContainer[1]", "/bin/sh failed with exit code 7", "it is broken"],
        ),
        (json!([hanging]), ["hooks.startContainer[0]", "timeout of 1 s and was killed", "so far"]),
        (json!([shell("kill -9 $$")]), ["hooks.startContainer[0]", "was killed by signal 9", "/bin/sh"]),
        (
            json!([{"path": "/no/hook"}]),
            ["hooks.startContainer[0]", "/no/hook cannot be executed", "No such"],
        ),
        (json!([{"path": "bin/sh"}]), ["hooks.startContainer[0].path", "`bin/sh`", "not an absolute path"]),
        (
            json!([{"path": "/bin/sh", "timeout": 0}]),
            ["hooks.startContainer[0].timeout", "0 is not", "seconds"],
        ),
    ] {
        let mut config = sandbox.bundle.config();
        config["hooks"] = json!({"startContainer": hooks});
        sandbox.bundle.write(&config);
        sandbox.run(["touch", "/home/ran"]).expect_error(ERROR, &words);
        assert!(!fs::exists(sandbox.bundle.root("home/ran")).unwrap(), "the program ran: {words:?}");
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn they_wait_for_the_start() {
    let sandbox = with_hooks("hooks-wait", json!([shell("echo hook >/out/ran")]))
        .config(|config| config["process"]["args"] = json!(["sleep", "1000"]))
        .mount("/out", "bind", "out", &["bind"]);
    fs::create_dir(sandbox.bundle.path().join("out")).unwrap();
    let ran = sandbox.bundle.path().join("out/ran");
    // The container keeps its creator's streams.
    let created = Command::new(binary("sandbox"))
        .arg("--root")
        .arg(sandbox.state())
        .args(["create", "--machine", &machine(), "--bundle"])
        .arg(sandbox.bundle.path())
        .arg(&sandbox.id)
        .env(MARK, &sandbox.id)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(created.unwrap().success());
    assert!(!ran.exists(), "it ran before the start");
    sandbox.verb(["start", &sandbox.id]).expect_code(0);
    assert_eq!(fs::read_to_string(&ran).unwrap(), "hook\n");
    sandbox.verb(["delete", "--force", &sandbox.id]).expect_code(0);
    sandbox.expect_nothing_left();
}
