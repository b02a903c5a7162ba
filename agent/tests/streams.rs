//! Standard streams, terminals and the ends of processes, through a real agent.

mod host;

use std::io::{Read, Write};

use host::{Guest, process, spec, write_and_end};
use sandbox_protocol::{Call, ExitStatus, FailureKind, RootWrites, Stream, Streams};
use serde_json::json;

#[test]
fn output_and_exit_code_come_back() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let ended = guest.run("c", &spec(&root, &["sh", "-c", "echo out; echo err >&2; exit 7"]));
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(ended.status, ExitStatus::Code(7));
    guest.power_off();
}

#[test]
fn a_signal_is_told_from_a_code() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let ended = guest.run("c", &spec(&root, &["sh", "-c", "trap - TERM; sh -c 'kill -9 $$'; exit $?"]));
    assert_eq!(ended.status, ExitStatus::Code(137));
    guest.create("k", &spec(&root, &["sleep", "1000"]), RootWrites::Overlay, None).unwrap();
    guest.start_container("k").unwrap();
    guest.signal("k", "", 9, false).unwrap();
    assert_eq!(guest.finish("k", "").status, ExitStatus::Signal(9));
    let gone = guest.signal("k", "", 9, false).unwrap_err();
    assert_eq!(gone.kind, FailureKind::NotFound);
}

#[test]
fn many_megabytes_go_through_both_ways() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    guest.create("c", &spec(&root, &["cat"]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    let sent: Vec<u8> = (0..20_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (stdin, copy) = (guest.stream("c", "", Stream::Stdin), sent.clone());
    let writer = std::thread::spawn(move || write_and_end(stdin, &copy));
    let mut got = Vec::new();
    guest.stream("c", "", Stream::Stdout).read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert!(got == sent);
    assert_eq!(guest.exited("c", "").0, ExitStatus::Code(0));
}

#[test]
fn output_that_nobody_reads_yet_is_not_lost_at_the_end() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let script = "head -c 2000000 /dev/zero; echo end";
    guest.create("c", &spec(&root, &["sh", "-c", script]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    // Another container runs meanwhile: the first one's full stream holds nothing up.
    assert_eq!(guest.run("d", &spec(&root, &["echo", "hi"])).stdout, "hi\n");
    assert_eq!(guest.finish("c", "").stdout.len(), 2_000_004);
}

#[test]
fn an_output_is_dialled_for_when_there_is_some() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let script = "exec 2>&-; read line; echo $line; read line";
    guest.create("c", &spec(&root, &["sh", "-c", script]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    // Whoever reads its errors learns that there will be none, although it runs on.
    assert_eq!(guest.silent_end("c", "", Stream::Stderr), None);
    let mut input = guest.stream("c", "", Stream::Stdin);
    input.write_all(b"word\n").unwrap();
    let mut said = String::new();
    let mut output = guest.stream("c", "", Stream::Stdout);
    drop(input);
    output.read_to_string(&mut said).unwrap();
    assert_eq!((said.as_str(), guest.exited("c", "").0), ("word\n", ExitStatus::Code(1)));
}

#[test]
fn an_output_that_cannot_be_dialled_for_is_told_to_be_lost() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    guest.create("c", &spec(&root, &["sleep", "1000"]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    drop(guest.stream("c", "", Stream::Stdin));
    let deaf = Streams { stdin: false, ..host::ALL };
    guest.stop_listening();
    guest.exec_with("c", "p", process(&["sh", "-c", "echo lost; exec sleep 1000"]), deaf).unwrap();
    let why = guest.silent_end("c", "p", Stream::Stdout).unwrap();
    assert!(why.contains("cannot connect to the host's port 1025"), "{why}");
    // One that cannot have its input is not run.
    let failure = guest.exec("c", "q", process(&["true"])).unwrap_err();
    assert!(failure.message.contains("cannot connect to the host's port 1025"), "{}", failure.message);
    guest.signal("c", "", 9, false).unwrap();
    assert_eq!(guest.exited("c", "").0, ExitStatus::Signal(9));
}

#[test]
fn input_that_nobody_reads_holds_nothing_up() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let script = "exec <&-; echo closed; exec sleep 1000";
    guest.create("c", &spec(&root, &["sh", "-c", script]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    let (mut stdin, mut stdout) =
        (guest.stream("c", "", Stream::Stdin), guest.stream("c", "", Stream::Stdout));
    let mut line = [0; 7];
    stdout.read_exact(&mut line).unwrap();
    // The agent closes its end, so that a write fails sooner or later and never blocks.
    while stdin.write_all(&[0; 65536]).is_ok() {}
    guest.signal("c", "", 9, false).unwrap();
    assert_eq!(guest.exited("c", "").0, ExitStatus::Signal(9));
}

#[test]
fn what_is_left_behind_ends_with_the_container_even_in_the_sandboxs_own_pid_namespace() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["sh", "-c", "sleep 1000 & echo started"]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "pid");
    let ended = guest.run("c", &spec);
    assert_eq!((ended.status, ended.stdout.as_str()), (ExitStatus::Code(0), "started\n"));
}

#[test]
fn more_processes_run_in_a_container() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    guest.create("c", &spec(&root, &["sleep", "1000"]), RootWrites::Overlay, None).unwrap();
    let early = guest.exec("c", "p", process(&["true"])).unwrap_err();
    assert_eq!(early.kind, FailureKind::NotFound);
    guest.start_container("c").unwrap();
    let script = "echo $$ > /dev/shm/pid; hostname; readlink /proc/1/exe; grep ^0 /proc/self/cgroup; sleep 1000 & exit 3";
    guest.exec("c", "p", process(&["sh", "-c", script])).unwrap();
    let ended = guest.finish("c", "p");
    assert_eq!(ended.stdout, "box\n/bin/busybox\n0::/\n", "{}", ended.stderr);
    assert_eq!(ended.status, ExitStatus::Code(3));

    let missing = guest.exec("c", "q", process(&["no-such-command"])).unwrap_err();
    assert_eq!(missing.kind, FailureKind::CommandNotFound);
    assert_eq!(missing.message, "exec: \"no-such-command\": executable file not found in $PATH");

    assert!(guest.delete("c").unwrap_err().message.contains("not stopped"));
    guest.signal("c", "", 15, true).unwrap();
    guest.signal("c", "", 9, true).unwrap();
    guest.exited("c", "");
    guest.delete("c").unwrap();
    assert_eq!(guest.delete("c").unwrap_err().kind, FailureKind::NotFound);
}

#[test]
fn a_terminal_is_one_in_every_way() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let script = "tty; stty size; read line; stty size; echo got $line; echo console > /dev/console; exit 4";
    let mut spec = spec(&root, &["sh", "-c", script]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 30, "width": 100});
    guest.create("c", &spec, RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    let mut terminal = guest.stream("c", "", Stream::Terminal);
    let mut seen = String::new();
    while !seen.contains("30 100") {
        let mut some = [0; 256];
        let n = terminal.read(&mut some).unwrap();
        seen.push_str(&String::from_utf8_lossy(&some[..n]));
    }
    guest
        .call(Call::Resize { container: "c".into(), process: String::new(), width: 90, height: 20 })
        .unwrap();
    terminal.write_all(b"hello\n").unwrap();
    terminal.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "/dev/pts/0\r\n30 100\r\nhello\r\n20 90\r\ngot hello\r\nconsole\r\n");
    assert_eq!(guest.exited("c", "").0, ExitStatus::Code(4));
}

#[test]
fn a_terminal_of_one_more_process_ends_with_it() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    guest.create("c", &spec(&root, &["sleep", "1000"]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    let mut process = process(&["sh", "-c", "tty; sleep 1000 & head -c 100000 /dev/zero; echo end"]);
    process["terminal"] = json!(true);
    guest.exec("c", "p", process).unwrap();
    let mut seen = Vec::new();
    guest.stream("c", "p", Stream::Terminal).read_to_end(&mut seen).unwrap();
    assert!(seen.starts_with(b"/dev/pts/0\r\n") && seen.ends_with(b"end\r\n"));
    assert_eq!(seen.len(), 12 + 100_000 + 5);
    assert_eq!(guest.exited("c", "p").0, ExitStatus::Code(0));
}

#[test]
fn a_start_need_not_wait_for_the_reply_to_create() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    for (command, outcome) in [("true", Ok(())), ("no-such-command", Err(FailureKind::CommandNotFound))] {
        let create = guest.send_create("c", &spec(&root, &[command]), RootWrites::Overlay, None);
        let start = guest.send(Call::Start { container: "c".into() });
        assert_eq!(guest.reply(create).map_err(|failure| failure.kind), outcome);
        assert_eq!(guest.reply(start).map_err(|failure| failure.kind), outcome);
        if outcome.is_ok() {
            assert_eq!(guest.exited("c", "").0, ExitStatus::Code(0));
            guest.delete("c").unwrap();
        }
    }
}

#[test]
fn the_agent_ends_when_the_host_is_gone_or_speaks_nonsense() {
    for nonsense in [false, true] {
        let Some(mut guest) = Guest::start() else { return };
        let root = guest.rootfs("root");
        guest.create("c", &spec(&root, &["sleep", "1000"]), RootWrites::Overlay, None).unwrap();
        guest.start_container("c").unwrap();
        if nonsense {
            guest.say(&u32::MAX.to_le_bytes());
        } else {
            guest.hang_up();
        }
        guest.ends();
    }
}

#[test]
fn many_containers_run_at_once() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let ids: Vec<String> = (0..12).map(|i| format!("c{i}")).collect();
    for id in &ids {
        guest.create(id, &spec(&root, &["cat"]), RootWrites::Overlay, None).unwrap();
        guest.start_container(id).unwrap();
    }
    for id in &ids {
        write_and_end(guest.stream(id, "", Stream::Stdin), id.as_bytes());
    }
    for id in &ids {
        let mut got = String::new();
        guest.stream(id, "", Stream::Stdout).read_to_string(&mut got).unwrap();
        assert_eq!((got.as_str(), guest.exited(id, "").0), (id.as_str(), ExitStatus::Code(0)));
        guest.delete(id).unwrap();
    }
}
