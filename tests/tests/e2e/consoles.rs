//! Terminals over a console socket, as engines ask for them.

use sandbox_tests::process::Process;
use sandbox_tests::sandbox;
use sandbox_tests::terminal::{ConsoleSocket, Terminal};

/// Says the size of its terminal, whenever that changes, until a line comes.
const SIZES: &str =
    "tty; stty size; trap 'stty size' WINCH; echo ready; while :; do read -t 1 line && exit 5; done";

#[test]
fn a_created_container_s_terminal_is_sent_and_follows_its_size() {
    let sandbox = sandbox("console-create")
        .command(["sh", "-c", SIZES])
        .config(|config| config["process"]["terminal"] = true.into());
    let console = ConsoleSocket::listen(&sandbox.directory().join("console"));
    let sandbox = sandbox.option("--console-socket", &console.path);
    let container = sandbox.create();
    let screen = console.receive();
    // As engines do: after the creation, before the start.
    screen.resize(101, 37);
    sandbox.on("start", []).expect_code(0);
    screen.wait_for("ready");
    assert!(screen.seen().contains("/dev/pts/"), "{:?}", screen.seen());
    screen.type_keys("x");
    screen.resize(80, 25);
    screen.wait_for("25 80");
    screen.type_keys("\n");
    assert_eq!(container.monitor.wait(), 5);
    assert!(screen.seen().contains("37 101"), "{:?}", screen.seen());
    sandbox.on("delete", []).expect_code(0);
    drop(console);
}

#[test]
fn a_container_with_a_terminal_needs_a_socket_and_one_without_must_not_have_it() {
    let sandbox = sandbox("console-none").config(|config| config["process"]["terminal"] = true.into());
    sandbox.create_in_vain().expect_error(1, &["without setting console socket"]);
    let sandbox = sandbox.config(|config| config["process"]["terminal"] = false.into());
    let socket = sandbox.directory().join("socket");
    let sandbox = sandbox.option("--console-socket", socket);
    sandbox.create_in_vain().expect_error(1, &["will not allocate tty"]);
    sandbox.expect_nothing_left();
}

#[test]
fn an_added_process_s_terminal_is_sent_and_follows_its_size() {
    let sandbox = sandbox("console-exec").command(["sleep", "1000"]);
    let container = sandbox.start();
    let console = ConsoleSocket::listen(&sandbox.directory().join("console"));
    let pid_file = sandbox.directory().join("exec-pid");
    let options = [
        "--detach",
        "--tty",
        "--pid-file",
        pid_file.to_str().unwrap(),
        "--console-socket",
        console.path.to_str().unwrap(),
    ];
    Process::spawn(&mut sandbox.exec_command(&options, ["sh", "-c", SIZES])).wait().expect_code(0);
    let holder = sandbox_tests::container::orphan_in(&pid_file);
    let screen = console.receive();
    screen.wait_for("ready");
    screen.resize(90, 20);
    screen.wait_for("20 90");
    screen.resize(91, 21);
    screen.wait_for("21 91");
    screen.type_keys("\n");
    assert_eq!(holder.wait(), 5);
    container.end();
}

#[test]
fn exec_on_a_terminal_uses_it() {
    let sandbox = sandbox("exec-tty").command(["sleep", "1000"]);
    let container = sandbox.start();
    let mut terminal = Terminal::spawn(&mut sandbox.exec_command(&["--tty"], ["sh", "-c", SIZES]), (99, 33));
    terminal.wait_for("ready");
    terminal.wait_for("33 99");
    assert!(!terminal.cooked());
    terminal.resize(80, 25);
    terminal.wait_for("25 80");
    terminal.type_keys("\n");
    assert_eq!(terminal.wait(), 5);
    assert!(terminal.cooked());
    container.end();
}

#[test]
fn a_console_socket_that_nobody_listens_on_is_an_error_and_leaves_nothing() {
    let sandbox = sandbox("console-deaf").command(["sleep", "1000"]);
    let container = sandbox.start();
    let nowhere = sandbox.directory().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    for options in
        [&["--tty", "--console-socket", nowhere][..], &["--detach", "--tty", "--console-socket", nowhere]]
    {
        let exec = Process::spawn(&mut sandbox.exec_command(options, ["sleep", "4321"])).wait();
        exec.expect_error(255, &["console socket", "nowhere"]);
    }
    assert!(!sandbox.on("ps", []).expect_code(0).out().contains("4321"));
    container.end();
    let sandbox = sandbox
        .config(|config| config["process"]["terminal"] = true.into())
        .option("--console-socket", nowhere.to_owned());
    sandbox.create_in_vain().expect_error(1, &["console socket", "nowhere"]);
    sandbox.expect_nothing_left();
}
