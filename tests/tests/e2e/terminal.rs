//! A terminal: raw mode, window size, control characters.

use sandbox_tests::sandbox;
use serde_json::json;

fn terminal_sandbox(name: &str) -> sandbox_tests::Sandbox {
    sandbox(name).config(|config| config["process"]["terminal"] = true.into())
}

#[test]
fn the_process_has_a_terminal_of_the_caller_s_size_that_follows_it() {
    let sandbox = terminal_sandbox("tty-size");
    let script =
        "tty; stty size; trap 'stty size' WINCH; echo ready; while :; do read -t 1 line && exit 5; done";
    let mut terminal = sandbox.terminal((132, 43), ["sh", "-c", script]);
    terminal.wait_for("ready");
    assert!(terminal.seen().contains("/dev/pts/"), "{:?}", terminal.seen());
    assert!(terminal.seen().contains("43 132"), "{:?}", terminal.seen());
    terminal.resize(80, 25);
    terminal.wait_for("25 80");
    terminal.type_keys("\n");
    assert_eq!(terminal.wait(), 5);
}

#[test]
fn the_caller_s_terminal_is_raw_meanwhile_and_restored_at_the_end() {
    let sandbox = terminal_sandbox("tty-raw");
    let mut terminal = sandbox.terminal((80, 24), ["sh", "-c", "echo ready; read line; echo \"<$line>\""]);
    terminal.wait_for("ready");
    assert!(!terminal.cooked(), "the caller's terminal is raw while the sandbox runs");
    terminal.type_keys("typed\r");
    terminal.wait_for("<typed>");
    assert_eq!(terminal.wait(), 0);
    assert!(terminal.cooked(), "the caller's terminal is as it was");
    // The guest's terminal echoes, once.
    assert_eq!(terminal.seen().matches("typed").count(), 2, "{:?}", terminal.seen());
}

#[test]
fn control_c_goes_to_the_process_as_a_key() {
    let sandbox = terminal_sandbox("tty-int");
    let script = "trap 'echo caught; exit 8' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = sandbox.terminal((80, 24), ["sh", "-c", script]);
    terminal.wait_for("ready");
    terminal.type_keys("\x03");
    terminal.wait_for("caught");
    assert_eq!(terminal.wait(), 8);
}

#[test]
fn an_interactive_shell_has_job_control_and_ends_at_control_d() {
    let sandbox = terminal_sandbox("tty-shell");
    let mut terminal = sandbox.terminal((80, 24), ["sh", "-i"]);
    terminal.wait_for("# ");
    terminal.type_keys("echo go; sleep 1000\r");
    terminal.wait_for("go\r\n");
    // The key does nothing until `sleep` has the terminal.
    terminal.type_keys_until("\x1a", "Stopped");
    // Back in the foreground, the job is interrupted, and the shell reads on.
    terminal.type_keys("fg\r");
    terminal.type_keys_until("\x03echo back-$((1+1))\r", "back-2");
    // Control-D is a key of the shell's only at its prompt.
    terminal.type_keys("echo last-$((2+2)); (exit 11)\r");
    terminal.wait_for("last-4");
    terminal.wait_for_last("/ # \x1b[6n");
    terminal.type_keys("\x04");
    assert_eq!(terminal.wait(), 11);
    assert!(!terminal.seen().contains("job control turned off"), "{:?}", terminal.seen());
}

#[test]
fn a_terminal_keeps_every_byte_of_a_long_output() {
    let sandbox = terminal_sandbox("tty-bulk");
    let mut terminal = sandbox.terminal((80, 24), ["sh", "-c", "seq 1 20000; echo all-$((1+1))"]);
    terminal.wait_for("all-2");
    assert_eq!(terminal.wait(), 0);
    let numbers = terminal.seen().lines().filter(|line| line.trim().parse::<u32>().is_ok()).count();
    assert_eq!(numbers, 20_000);
}

#[test]
fn console_size_is_honoured_where_the_caller_has_no_terminal() {
    let sandbox = terminal_sandbox("console-size")
        .config(|config| config["process"]["consoleSize"] = json!({"height": 33, "width": 99}));
    let outcome = sandbox.run(["stty", "size"]).expect_code(0);
    assert_eq!(outcome.out().trim(), "33 99", "{outcome}");
}
