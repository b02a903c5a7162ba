//! What the host asks of a container that runs: to stand still, to use less, to tell what it does.

mod host;

use std::io::{Read, Write};

use host::{Guest, process, spec};
use sandbox_protocol::{ExitStatus, FailureKind, ProcessInfo, RootWrites, Stream};
use serde_json::json;

/// A container whose program echoes each line.
fn echoing(guest: &mut Guest) {
    let root = guest.rootfs("root");
    let spec = spec(&root, &["sh", "-c", "while read line; do echo $line; done"]);
    guest.create("c", &spec, RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let Some(mut guest) = Guest::start() else { return };
    echoing(&mut guest);
    let mut input = guest.stream("c", "", Stream::Stdin);
    input.write_all(b"first\n").unwrap();
    let mut output = guest.stream("c", "", Stream::Stdout);
    let mut line = [0; 6];
    output.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"first\n");
    guest.pause("c").unwrap();
    input.write_all(b"hello\n").unwrap();
    let failure = guest.exec("c", "p", process(&["true"])).unwrap_err();
    assert!(failure.message.contains("is paused: resume it first"), "{}", failure.message);
    assert!(guest.pause("c").unwrap_err().message.contains("is paused already"));
    // Signals reach it, and it stays where it is.
    guest.signal("c", "", libc::SIGCONT, true).unwrap();
    assert!(guest.pause("c").unwrap_err().message.contains("is paused already"));
    output.set_nonblocking(true).unwrap();
    assert_eq!(output.read(&mut [0; 6]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);

    guest.resume("c").unwrap();
    output.set_nonblocking(false).unwrap();
    output.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"hello\n");
    assert!(guest.resume("c").unwrap_err().message.contains("is not paused"));
    // As often as one likes.
    for _ in 0..20 {
        guest.pause("c").unwrap();
        guest.resume("c").unwrap();
    }
    drop(input);
    assert_eq!(guest.exited("c", ""), (ExitStatus::Code(0), false));
}

#[test]
fn only_what_runs_can_be_paused() {
    let Some(mut guest) = Guest::start() else { return };
    assert_eq!(guest.pause("c").unwrap_err().kind, FailureKind::NotFound);
    let root = guest.rootfs("root");
    guest.create("c", &spec(&root, &["true"]), RootWrites::Overlay, None).unwrap();
    assert!(guest.pause("c").unwrap_err().message.contains("is not running"));
    guest.start_container("c").unwrap();
    guest.finish("c", "");
    assert!(guest.pause("c").unwrap_err().message.contains("is not running"));
    assert!(guest.resume("c").unwrap_err().message.contains("is not running"));
    assert!(guest.update("c", json!({})).unwrap_err().message.contains("has stopped"));
    assert_eq!(guest.processes("c").processes, []);
    guest.delete("c").unwrap();
}

#[test]
fn a_paused_container_can_be_killed_and_its_end_is_reported() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    // With a pid namespace the kernel kills the rest, without one the agent does.
    for (namespaces, all) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut spec = spec(&root, &["sh", "-c", "sleep 1000 & sleep 1000"]);
        if !namespaces {
            spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
        }
        guest.create("c", &spec, RootWrites::Overlay, None).unwrap();
        guest.start_container("c").unwrap();
        guest.pause("c").unwrap();
        guest.signal("c", "", libc::SIGKILL, all).unwrap();
        assert_eq!(guest.finish("c", "").status, ExitStatus::Signal(9));
        guest.delete("c").unwrap();
    }
}

#[test]
fn the_processes_of_a_container_are_told() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let child = "echo; sleep 1000; true";
    let script = format!("sh -c '{child}' & wait");
    let mut spec = spec(&root, &["sh", "-c", &script]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 44});
    guest.create("c", &spec, RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    guest.stream("c", "", Stream::Stdout).read_exact(&mut [0]).unwrap();
    let told = guest.processes("c");
    let [first, second, ..] = &told.processes[..] else { panic!("{told:?}") };
    assert!(!told.truncated && first.pid < second.pid);
    assert_eq!((&first.command, first.ppid), (&format!("sh -c {script}"), 1));
    assert_eq!((&second.command, second.ppid), (&format!("sh -c {child}"), first.pid));
    assert_eq!((second.uid, &second.tty), (33, &None));
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(second.start_seconds <= now + 1 && second.start_seconds + 3600 > now, "{second:?}");
    guest.signal("c", "", libc::SIGKILL, false).unwrap();
    guest.exited("c", "");
}

#[test]
fn a_terminal_is_told_by_its_name() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["cat"]);
    spec["process"]["terminal"] = json!(true);
    guest.create("c", &spec, RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    let told = guest.processes("c").processes;
    let [ProcessInfo { tty, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(tty.as_deref(), Some("pts/0"));
    guest.signal("c", "", libc::SIGKILL, false).unwrap();
    guest.exited("c", "");
}

#[test]
fn what_a_process_says_of_itself_does_not_break_the_table() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let script = "printf 'a) R 7 7 (\\n' > /proc/self/comm; echo; read line";
    let spec = spec(&root, &["sh", "-c", script, &"\u{1}".repeat(60_000)]);
    guest.create("c", &spec, RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    guest.stream("c", "", Stream::Stdout).read_exact(&mut [0]).unwrap();
    let told = guest.processes("c").processes;
    let [told] = &told[..] else { panic!("{told:?}") };
    assert_eq!((told.ppid, told.command.len()), (1, 1024));
    guest.signal("c", "", libc::SIGKILL, false).unwrap();
    guest.exited("c", "");
}

#[test]
fn what_a_container_uses_is_told() {
    let Some(mut guest) = Guest::start() else { return };
    echoing(&mut guest);
    let input = guest.stream("c", "", Stream::Stdin);
    let stats = guest.stats("c");
    assert!(stats.cpu.usage_micros > 0, "{stats:?}");
    assert!(stats.cpu.usage_micros >= stats.cpu.user_micros, "{stats:?}");
    drop(input);
    guest.exited("c", "");
}

#[test]
fn limits_change_all_together_or_not_at_all() {
    let Some(mut guest) = Guest::start() else { return };
    echoing(&mut guest);
    // Files that every cgroup has, whatever controllers there are.
    const DEPTH: &str = "cgroup.max.depth";
    const WIDTH: &str = "cgroup.max.descendants";
    guest.update("c", json!({})).unwrap();
    guest.update("c", json!({"unified": {DEPTH: "3", WIDTH: "4"}})).unwrap();
    guest.update("c", json!({"unified": {DEPTH: "5"}})).unwrap();
    let limits = |guest: &Guest| [DEPTH, WIDTH].map(|file| guest.cgroup_file("c", file));
    assert_eq!(limits(&guest), ["5\n", "4\n"]);
    for (resources, field) in [
        (json!({"memory": {"limit": 100, "swap": 50}}), "linux.resources.memory.swap"),
        (json!({"unified": {DEPTH: "6", "../x.y": "1"}}), "linux.resources.unified"),
        (json!({"unified": {DEPTH: "6", "none.such": "1"}}), "linux.resources.unified"),
        (json!({"unified": {DEPTH: "6", WIDTH: "wide"}}), "linux.resources.unified"),
    ] {
        let failure = guest.update("c", resources).unwrap_err();
        assert!(failure.message.contains(field), "{}", failure.message);
        assert_eq!(limits(&guest), ["5\n", "4\n"]);
    }
    guest.signal("c", "", libc::SIGKILL, false).unwrap();
    guest.finish("c", "");
}

#[test]
fn a_container_whose_process_cannot_be_cloned_leaves_no_cgroup() {
    let Some(mut guest) = Guest::start_without_processes() else { return };
    let root = guest.rootfs("root");
    let failure = guest.create("c", &spec(&root, &["true"]), RootWrites::Overlay, None).unwrap_err();
    assert!(failure.message.contains("cannot clone a process"), "{}", failure.message);
    assert!(!guest.has_cgroup("c"));
    assert!(guest.delete("c").is_err());
}
