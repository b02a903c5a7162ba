//! Hooks that run on the host.

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
        "poststart": list("poststart"),
        "poststop": list("poststop"),
    });
    let sandbox = with_hooks(sandbox, hooks);
    sandbox.run(["echo", "ran"]).expect_stdout("ran\n");
    let noted = std::fs::read_to_string(sandbox.directory().join("noted")).unwrap();
    let expected = "prestart creating\ncreateRuntime creating\npoststart running\npoststop stopped\n";
    assert_eq!(noted, expected);
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
    sandbox.run(["echo", "ran"]).expect_error(125, &["timeout of 1s"]);
    sandbox.expect_nothing_left();
}

#[test]
fn a_hook_that_fails_later_is_said_and_no_more() {
    let sandbox = sandbox("hook-late");
    let missing = json!([{"path": "/no/such/hook"}]);
    let sandbox = with_hooks(sandbox, json!({"poststart": missing, "poststop": missing}));
    let outcome = sandbox.run(["echo", "ran"]).expect_code(0);
    assert_eq!(outcome.out(), "ran\n");
    for point in ["poststart", "poststop"] {
        assert!(outcome.err().contains(&format!("the {point} hook /no/such/hook")), "{outcome}");
    }
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
