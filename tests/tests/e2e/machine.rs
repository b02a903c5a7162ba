//! `sandbox-vmm` driven directly: devices, the control socket, and how a machine ends.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sandbox_tests::pattern::{Checksum, checksum_of, sequence};
use sandbox_tests::place::{on_kvm, patience};
use sandbox_tests::vmm::{Machine, plan};
use sandbox_vmm_api::{
    ControlReply, ControlRequest, DiskConfig, ExitReason, NetConfig, ShareEntry, TapSource, VmConfig,
    VmEvent, VmState,
};

/// Tells the probe something and waits for its answer, which must not be a failure.
#[track_caller]
fn ask(machine: &mut Machine, order: &str) -> String {
    machine.tell(order);
    let start = format!("{order}: ");
    machine.wait_for_report(&start);
    let deadline = Instant::now() + patience();
    loop {
        let report = machine.report();
        let answer = report.rsplit_once(&start).map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        if let Some((line, _)) = answer.split_once('\n') {
            return line.to_owned();
        }
        assert!(Instant::now() < deadline, "half an answer: {report:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Starts a machine whose probe waits for orders.
#[track_caller]
fn waiting(change: impl FnOnce(&mut VmConfig, &Path)) -> Machine {
    let mut plan = plan("nothing");
    change(&mut plan.config, plan.directory.path());
    let mut machine = plan.start();
    machine.expect_running();
    machine.wait_for_report("nothing: done\n");
    machine
}

#[test]
fn power_off_panic_reset_and_triple_fault_are_told_apart() {
    let end = |task: &str, words: &str| {
        let mut plan = plan(task);
        plan.config.cmdline = format!("{} {words}", plan.config.cmdline);
        let mut machine = plan.start();
        machine.expect_running();
        if task == "nothing" {
            machine.wait_for_report("nothing: done\n");
            machine.close_report();
        }
        machine.expect_exit()
    };
    assert_eq!(end("nothing", ""), ExitReason::PowerOff);
    assert_eq!(end("reset", ""), ExitReason::Reset);
    let fault = end("reset", "reboot=t");
    if on_kvm() {
        assert_eq!(fault, ExitReason::TripleFault);
    } else {
        assert!(matches!(fault, ExitReason::TripleFault | ExitReason::Reset), "{fault:?}");
    }
    let ExitReason::Panic { console } = end("panic", "") else { panic!("a panic was expected") };
    let text = console.join("\n");
    assert!(text.contains("these are the last words"), "{text}");
    assert!(text.contains("Attempted to kill init"), "{text}");
    assert!(console.len() <= 64, "{} lines", console.len());
}

#[test]
fn a_panic_without_a_vsock_device_is_a_panic_too() {
    let mut plan = plan("panic");
    plan.config.vsock = None;
    assert!(matches!(plan.start().expect_exit(), ExitReason::Panic { .. }));
}

#[test]
fn a_machine_with_memory_above_4_gib_starts_and_its_panic_is_told() {
    let mut plan = plan("panic");
    plan.config.memory_mib = 5 << 10;
    assert!(matches!(plan.start().expect_exit(), ExitReason::Panic { .. }));
}

#[test]
fn a_machine_has_the_cpus_it_was_given() {
    for vcpus in [1, 2, 4] {
        let mut machine = waiting(|config, _| config.vcpus = vcpus);
        assert_eq!(ask(&mut machine, "cpus"), vcpus.to_string());
    }
}

/// An image that says of itself that it is a qcow2 of 1 GiB over a file of the host.
fn posing_image() -> Vec<u8> {
    let backing = b"/etc/passwd";
    let mut image = b"QFI\xfb\0\0\0\x02".to_vec();
    image.extend(72u64.to_be_bytes());
    image.extend((backing.len() as u32).to_be_bytes());
    image.extend(16u32.to_be_bytes());
    image.extend((1u64 << 30).to_be_bytes());
    image.resize(72, 0);
    image.extend(backing);
    image.resize(64 << 10, 0);
    image
}

#[test]
fn disks_are_read_and_written_and_read_only_is_read_only() {
    const BYTES: usize = 20 << 20;
    let mut machine = waiting(|config, at| {
        for (name, read_only) in [("fixed", true), ("free", false)] {
            let path = at.join(name);
            fs::write(&path, sequence(BYTES)).unwrap();
            config.disks.push(DiskConfig { path, read_only });
        }
        let path = at.join("posing");
        fs::write(&path, posing_image()).unwrap();
        config.disks.push(DiskConfig { path, read_only: false });
    });
    let mut posing = Checksum::default();
    posing.add(&posing_image());
    assert_eq!(ask(&mut machine, "read-disk vdc"), format!("{posing} ro=0"), "its format is raw");
    assert_eq!(ask(&mut machine, "read-disk vda"), format!("{} ro=1", checksum_of(BYTES)));
    assert_eq!(ask(&mut machine, "read-disk vdb"), format!("{} ro=0", checksum_of(BYTES)));
    assert!(ask(&mut machine, "write-disk vda 4096").contains("FAILED"));
    fs::write(machine.plan.directory.path().join("free"), vec![0; BYTES]).unwrap();
    assert_eq!(ask(&mut machine, &format!("write-disk vdb {BYTES}")), "written");
    let free = fs::read(machine.plan.directory.path().join("free")).unwrap();
    assert!(free == sequence(BYTES), "what the guest wrote and synced is in the file");
    let fixed = fs::read(machine.plan.directory.path().join("fixed")).unwrap();
    assert!(fixed == sequence(BYTES));
}

#[test]
fn a_network_interface_carries_datagrams_both_ways() {
    let tap = Tap::new(&format!("sbt{}", std::process::id()), "198.18.7.1/24");
    let echo = UdpSocket::bind("198.18.7.1:0").unwrap();
    let port = echo.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buffer = [0; 64 << 10];
        while let Ok((n, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..n], from);
        }
    });
    let mut machine = waiting(|config, _| {
        config.nets.push(NetConfig { tap: TapSource::Name(tap.0.clone()), mac: "02:00:00:00:00:07".into() });
    });
    assert_eq!(ask(&mut machine, &format!("net 198.18.7.2 198.18.7.1:{port}")), "echoed");
    let neighbours = Command::new("ip").args(["neigh", "show", "dev", &tap.0]).output().unwrap();
    let neighbours = String::from_utf8_lossy(&neighbours.stdout).into_owned();
    assert!(neighbours.contains("02:00:00:00:00:07"), "the guest has the address it was given: {neighbours}");
}

/// A tap device of the test's own.
struct Tap(String);

impl Tap {
    fn new(name: &str, address: &str) -> Self {
        let tap = Self(name.to_owned());
        for words in [
            &["tuntap", "add", "dev", name, "mode", "tap"][..],
            &["addr", "add", address, "dev", name],
            &["link", "set", name, "up"],
        ] {
            assert!(Command::new("ip").args(words).status().unwrap().success(), "ip {words:?}");
        }
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

#[test]
fn the_guest_has_a_random_number_device() {
    let mut machine = waiting(|_, _| {});
    let answer = ask(&mut machine, "random");
    assert!(answer.starts_with("virtio") && answer.ends_with("random"), "{answer}");
}

#[test]
fn a_balloon_gives_memory_back_that_the_guest_freed() {
    const MIB: u64 = 1 << 20;
    let mut machine = waiting(|config, _| {
        config.memory_mib = 512;
        config.balloon = true;
    });
    ask(&mut machine, "allocate 300");
    let full = machine.statistics().memory_resident_bytes;
    assert!(full > 300 * MIB, "{} MiB are resident", full / MIB);
    ask(&mut machine, "free");
    let deadline = Instant::now() + patience();
    while machine.statistics().memory_resident_bytes > full - 200 * MIB {
        let now = machine.statistics();
        assert!(
            Instant::now() < deadline,
            "still {} of {} MiB: {now:?}",
            now.memory_resident_bytes / MIB,
            full / MIB
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    if on_kvm() {
        assert!(machine.statistics().memory_reported_bytes > 200 * MIB, "{:?}", machine.statistics());
    }
    assert_eq!(ask(&mut machine, "allocate 300"), "done");
}

#[test]
fn there_is_a_serial_console_only_when_asked_for() {
    let mut with = waiting(|config, at| config.console = Some(at.join("console")));
    assert_eq!(ask(&mut with, "print on-the-console"), "done");
    let console = with.plan.directory.path().join("console");
    let deadline = Instant::now() + patience();
    while !fs::read_to_string(&console).unwrap_or_default().contains("on-the-console") {
        assert!(Instant::now() < deadline, "{:?}", fs::read_to_string(&console));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(fs::read_to_string(&console).unwrap().contains("Linux version"));
    let mut without = waiting(|_, _| {});
    assert_eq!(ask(&mut without, "ports"), "[ff, ff]");
}

#[test]
fn the_share_shows_its_entries_and_read_only_holds_on_the_host() {
    let mut machine = waiting(|config, at| {
        for (name, read_only) in [("fixed", true), ("free", false)] {
            let source = at.join(name);
            fs::create_dir_all(source.join("directory")).unwrap();
            fs::write(source.join("file"), "content").unwrap();
            config.shares.push(ShareEntry {
                path: format!("top/{name}").into(),
                source,
                read_only,
                id_map: None,
            });
        }
    });
    assert_eq!(ask(&mut machine, "mount-share"), "done");
    assert_eq!(ask(&mut machine, "try-writes /mnt/top/fixed"), "all refused");
    let through = ask(&mut machine, "try-writes /mnt/top/free");
    assert!(
        through.contains("FAILED") && through.contains("create") && through.contains("unlink"),
        "{through}"
    );
    let made_outside = ask(&mut machine, "try-writes /mnt");
    assert!(!made_outside.contains("create") && !made_outside.contains("mkdir"), "{made_outside}");
    assert_eq!(fs::read_to_string(machine.plan.directory.path().join("fixed/file")).unwrap(), "content");
}

#[test]
fn the_control_socket_tells_holds_and_resumes() {
    let mut machine = waiting(|_, _| {});
    let state = |machine: &Machine| match machine.control(ControlRequest::State) {
        ControlReply::State { state, .. } => state,
        other => panic!("not a state: {other:?}"),
    };
    assert_eq!(state(&machine), VmState::Running);
    assert_eq!(machine.control(ControlRequest::Pause), ControlReply::Done);
    assert_eq!(machine.control(ControlRequest::Pause), ControlReply::Done);
    assert_eq!(state(&machine), VmState::Paused);
    machine.tell("tick");
    std::thread::sleep(Duration::from_secs(2));
    assert!(!machine.report().contains("tick"), "a paused guest does nothing: {:?}", machine.report());
    assert_eq!(machine.control(ControlRequest::Resume), ControlReply::Done);
    assert_eq!(state(&machine), VmState::Running);
    machine.wait_for_report("tick: ");
}

#[test]
fn the_control_socket_answers_nonsense_with_an_error() {
    let machine = waiting(|_, _| {});
    for line in ["", "{}", "nonsense", "{\"op\":\"frob\"}"] {
        let answer = machine.control_line(line);
        let reply: ControlReply = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer:?}"));
        assert!(matches!(reply, ControlReply::Error { .. }), "{reply:?}");
    }
    // A line without an end is cut off; the answer may be lost with the connection.
    let mut endless = UnixStream::connect(&machine.plan.config.control_socket).unwrap();
    endless.set_write_timeout(Some(patience())).unwrap();
    let chunk = [b'x'; 4096];
    while std::io::Write::write(&mut endless, &chunk).is_ok_and(|n| n > 0) {}
    // A client that connects and says nothing does not keep others out.
    let _silent = UnixStream::connect(&machine.plan.config.control_socket).unwrap();
    assert!(matches!(machine.control(ControlRequest::State), ControlReply::State { .. }));
}

#[test]
fn statistics_count_what_the_machine_does() {
    let mut machine = waiting(|_, _| {});
    let before = machine.statistics();
    ask(&mut machine, "random");
    let after = machine.statistics();
    assert!(before.memory_resident_bytes > 1 << 20, "{before:?}");
    if on_kvm() {
        assert!(after.vcpu_exits > before.vcpu_exits, "{before:?} {after:?}");
    }
    assert!(after.devices.contains_key("vsock"), "{after:?}");
}

#[test]
fn stop_and_a_closed_event_socket_end_the_machine() {
    let mut machine = waiting(|_, _| {});
    assert_eq!(machine.control(ControlRequest::Stop), ControlReply::Done);
    assert_eq!(machine.expect_exit(), ExitReason::Stopped);
    machine.end();
    let mut machine = waiting(|_, _| {});
    machine.hang_up();
    machine.end();
    let mut machine = waiting(|_, _| {});
    assert_eq!(machine.control(ControlRequest::Pause), ControlReply::Done);
    assert_eq!(machine.control(ControlRequest::Stop), ControlReply::Done);
    assert_eq!(machine.expect_exit(), ExitReason::Stopped);
}

#[test]
fn a_terminated_vmm_stops_its_machine() {
    let mut machine = waiting(|_, _| {});
    machine.process().signal(Signal::SIGTERM);
    assert!(matches!(machine.event(), Some(VmEvent::Exited { reason: ExitReason::Stopped }) | None));
    machine.end();
}

#[test]
fn a_configuration_that_cannot_be_is_a_failure_with_its_reason() {
    let fails = |change: &dyn Fn(&mut VmConfig), words: &[&str]| {
        let mut plan = plan("nothing");
        change(&mut plan.config);
        let reason = plan.start().expect_exit();
        let ExitReason::Failed { message } = &reason else { panic!("{reason:?}") };
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
    };
    fails(&|config| config.kernel = "/no/such/kernel".into(), &["/no/such/kernel", "No such file"]);
    fails(&|config| config.kernel = "/etc/passwd".into(), &["/etc/passwd"]);
    fails(&|config| config.image = "/no/such/image".into(), &["/no/such/image", "No such file"]);
    fails(&|config| config.memory_mib = 1, &["memory"]);
    fails(&|config| config.vcpus = 0, &["vcpus"]);
    fails(&|config| config.shares = vec![entry("../x", "/")], &["../x"]);
    fails(&|config| config.shares = vec![entry("x", "/no/such/place")], &["/no/such/place"]);
    let disk = DiskConfig { path: "/no/such/disk".into(), read_only: false };
    fails(&|config| config.disks = vec![disk.clone()], &["/no/such/disk"]);
    let net = NetConfig { tap: TapSource::Name("no-such-tap".into()), mac: "02:00:00:00:00:01".into() };
    fails(&|config| config.nets = vec![net.clone()], &["no-such-tap"]);
}

fn entry(path: &str, source: &str) -> ShareEntry {
    ShareEntry { path: path.into(), source: source.into(), read_only: true, id_map: None }
}

#[test]
fn host_programs_reach_guest_ports_and_refused_ones_are_closed() {
    use std::io::{Read, Write};
    let mut machine = waiting(|_, _| {});
    let mut connection = UnixStream::connect(machine.vsock()).unwrap();
    connection.set_read_timeout(Some(patience())).unwrap();
    connection.write_all(b"CONNECT 77\n").unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    assert!(!answer.starts_with("OK"), "nobody listens on guest port 77: {answer:?}");
    let mut nonsense = UnixStream::connect(machine.vsock()).unwrap();
    nonsense.set_read_timeout(Some(patience())).unwrap();
    let _ = nonsense.write_all(&[b'x'; 4096]);
    let mut answer = vec![];
    // The machine closes it, by an end or by a reset.
    let _ = nonsense.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"OK"));
    assert_eq!(ask(&mut machine, "cpus"), "1");
}
