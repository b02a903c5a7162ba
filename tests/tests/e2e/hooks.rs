//! Hooks that run on the host, and all six in their order.

use sandbox_tests::gates::Gates;
use sandbox_tests::process::Process;
use sandbox_tests::{Sandbox, sandbox};
use serde_json::{Value, json};

/// A hook that runs a shell script, with the test's directory as its first argument.
fn hook(sandbox: &Sandbox, script: &str) -> Value {
    json!({
        "path": "/bin/sh",
        "args": ["sh", "-c", script, "hook", sandbox.directory()],
        "env": ["PATH=/usr/bin:/bin"],
        "timeout": 20,
    })
}

/// Notes the hook's point and the status that it was told.
fn noting(sandbox: &Sandbox, point: &str) -> Value {
    let script =
        format!(r#"status=$(sed 's/.*"status":"\([a-z]*\)".*/\1/'); echo {point} $status >>"$1/noted""#);
    hook(sandbox, &script)
}

fn with_hooks(sandbox: Sandbox, hooks: Value) -> Sandbox {
    sandbox.config(|config| config["hooks"] = hooks)
}

#[test]
fn hooks_run_at_their_points_in_order() {
    let sandbox = sandbox("hooks");
    let list = |point: &str| json!([noting(&sandbox, point)]);
    let hooks = json!({
        "prestart": list("prestart"),
        "createRuntime": list("createRuntime"),
        "createContainer": list("createContainer"),
        "startContainer": [{
            "path": "/bin/sh",
            "args": ["sh", "-c", "grep -o '\"status\":\"[a-z]*' | sed 's/.*\"/startContainer /' >>/noted"],
            "env": ["PATH=/bin"],
        }],
        "poststart": list("poststart"),
        "poststop": list("poststop"),
    });
    std::fs::write(sandbox.directory().join("noted"), "").expect("a file");
    let noted = sandbox.directory().join("noted");
    let sandbox = with_hooks(sandbox, hooks).mount("/noted", "bind", noted, &["bind"]);
    sandbox.run(["sh", "-c", "echo process >>/noted"]).expect_code(0);
    let noted = std::fs::read_to_string(sandbox.directory().join("noted")).unwrap();
    let mut lines: Vec<_> = noted.lines().collect();
    // A hook after the start runs beside the process.
    let process = lines.iter().position(|line| *line == "process").expect("the process's line");
    assert!(process >= 4, "{noted}");
    lines.remove(process);
    let expected = [
        "prestart creating",
        "createRuntime creating",
        "createContainer creating",
        "startContainer created",
        "poststart running",
        "poststop stopped",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn hooks_of_create_container_find_its_files_in_their_places() {
    let script = "cat /from-hook /data/from-hook; ls /data/inner; exec sleep 1000";
    let sandbox = sandbox("hooks-view").command(["sh", "-c", script]);
    let data = sandbox.directory().join("data");
    std::fs::create_dir_all(data.join("inner")).expect("a directory");
    let script = r#"
        cd rootfs && test -f bin/busybox && test -d data/inner && test -f /etc/passwd || exit 3
        echo to the root >from-hook; echo to the volume >data/from-hook
        test -z "$(ls proc)" || exit 4
        ! touch proc/file 2>/dev/null || exit 5
        ! bin/busybox true 2>/dev/null || exit 6
        mount -t tmpfs tmpfs data/inner && touch data/inner/unseen || exit 7
        readlink /proc/self/ns/mnt >"$1/mounts"
    "#;
    let hooks = json!({"createContainer": [hook(&sandbox, script)]});
    let sandbox = with_hooks(sandbox, hooks).mount("/data", "bind", &data, &["rbind", "rw"]);
    let mut container = sandbox.start();
    container.wait_for_stdout("to the root\nto the volume\n");
    container.end();
    assert!(!sandbox.bundle.root("data/inner").exists() && !data.join("inner/unseen").exists());
    let own = std::fs::read_link("/proc/self/ns/mnt").expect("a link");
    let its = std::fs::read_to_string(sandbox.directory().join("mounts")).expect("a file");
    assert_ne!(its.trim(), own.to_str().unwrap());
}

#[test]
fn hooks_of_create_container_cannot_change_a_bundle_that_is_left_untouched() {
    let sandbox = sandbox("hooks-untouched");
    let script = "! touch rootfs/made 2>/dev/null && touch \"$1/ran\"";
    let hooks = json!({"createContainer": [hook(&sandbox, script)]});
    let sandbox = with_hooks(sandbox, hooks);
    sandbox.run(["true"]).expect_code(0);
    assert!(sandbox.directory().join("ran").exists() && !sandbox.bundle.root("made").exists());
}

#[test]
fn a_hook_of_create_container_that_fails_ends_the_creation() {
    let sandbox = sandbox("hook-view-fails");
    let hooks = json!({"createContainer": [hook(&sandbox, "echo no such library >&2; exit 3")]});
    let sandbox = with_hooks(sandbox, hooks);
    sandbox.create_in_vain().expect_error(1, &["createContainer", "/bin/sh", "no such library"]);
    sandbox.expect_nothing_left();
    let mut slow = hook(&sandbox, "exec sleep 1000");
    slow["timeout"] = 1.into();
    let sandbox = with_hooks(sandbox, json!({"createContainer": [slow]}));
    sandbox.run(["echo", "ran"]).expect_error(125, &["createContainer", "timeout of 1s"]);
    sandbox.expect_nothing_left();
}

#[test]
fn a_hook_that_fails_before_the_container_ends_the_sandbox() {
    let sandbox = sandbox("hook-fails");
    let hooks = json!({"createRuntime": [hook(&sandbox, "echo no network here >&2; exit 3")]});
    let sandbox = with_hooks(sandbox, hooks);
    sandbox.run(["echo", "ran"]).expect_error(125, &["createRuntime", "/bin/sh", "no network here"]);
    sandbox.expect_nothing_left();
}

#[test]
fn a_hook_that_hangs_is_killed_at_its_timeout() {
    let sandbox = sandbox("hook-hangs");
    let mut slow = hook(&sandbox, "exec sleep 1000");
    slow["timeout"] = 1.into();
    let sandbox = with_hooks(sandbox, json!({"prestart": [slow]}));
    sandbox.run(["echo", "ran"]).expect_error(125, &["the prestart hook", "timeout of 1s"]);
    sandbox.expect_nothing_left();
}

#[test]
fn a_hook_that_fails_later_is_said_and_no_more() {
    let sandbox = sandbox("hook-late");
    let missing = json!({"path": "/no/such/hook"});
    // One that fails when the process has long ended.
    let slow = hook(&sandbox, "sleep 1; echo too late >&2; exit 3");
    let sandbox = with_hooks(sandbox, json!({"poststart": [missing, slow], "poststop": [missing]}));
    let outcome = sandbox.run(["echo", "ran"]).expect_code(0);
    assert_eq!(outcome.out(), "ran\n");
    for said in ["the poststart hook /no/such/hook", "the poststop hook /no/such/hook", "too late"] {
        assert!(outcome.err().contains(said), "{outcome}");
    }
}

#[test]
fn a_container_that_is_killed_waits_for_no_hook() {
    let sandbox = sandbox("hook-held").command(["echo", "ran"]);
    let gates = Gates::make(&sandbox.directory().join("gates"));
    let sandbox = with_hooks(sandbox, gates.hooks(None));
    let mut container = sandbox.create();
    gates.close("poststart");
    let mut starting = Process::spawn(&mut sandbox.verb_command(["start", sandbox.id.as_str()]));
    gates.wait_at("poststart", &mut starting);
    container.wait_for_stdout("ran\n");
    // Its process may have ended or not, and the hook does not end by itself.
    sandbox.on("kill", ["KILL"]);
    container.monitor.wait();
    starting.wait().expect_code(0);
    gates.open("poststart");
    sandbox.on("delete", []).expect_stdout("");
}

#[test]
fn a_hook_that_fails_in_delete_is_in_the_log() {
    let sandbox = with_hooks(sandbox("hook-log"), json!({"poststop": [{"path": "/no/such/hook"}]}));
    let container = sandbox.start();
    assert_eq!(container.monitor.wait(), 0);
    let log = sandbox.directory().join("log");
    let words = ["--log", log.to_str().unwrap(), "--log-format", "json", "delete", &sandbox.id];
    sandbox.verb(words).expect_code(0);
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(log.contains("the poststop hook /no/such/hook"), "{log}");
}

#[test]
fn hooks_that_make_no_sense_are_named_by_their_path() {
    for (hook, path) in [
        (json!({"path": "relative"}), "hooks.poststop[0].path"),
        (json!({"path": "/bin/true", "timeout": 0}), "hooks.poststop[0].timeout"),
    ] {
        let sandbox = with_hooks(sandbox("hook-bad"), json!({"poststop": [hook]}));
        sandbox.run(["echo", "ran"]).expect_error(125, &[path]);
    }
}
