//! Workloads that take what they can get, with a neighbour beside them that goes on.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sandbox_tests::bare::{self, Script};
use sandbox_tests::network::{Net, answer};
use sandbox_tests::place::{machine, patience};
use sandbox_tests::process::{POLL, Process};
use sandbox_tests::{Sandbox, leaks, sandbox, skip};
use serde_json::json;

/// More processes, and more memory, without an end.
const BOMBS: &str = "echo ready; \
    fork() { fork | fork & }; \
    grow() { x=xxxxxxxxxxxxxxxx; while true; do x=$x$x; done; }; \
    grow & grow & fork; \
    while true; do :; done";

#[test]
fn fork_bombs_and_memory_bombs_stay_in_their_sandbox() {
    let neighbour = sandbox("beside-bombs").command(["sleep", "1000"]);
    let container = neighbour.start();
    let offender = sandbox("bombs").option("--memory", "96M");
    let mut bombs = offender.spawn(["sh", "-c", BOMBS]);
    bombs.wait_for_stdout("ready");
    for _ in 0..3 {
        neighbour.exec(&[], ["echo", "unharmed"]).expect_stdout("unharmed\n");
    }
    // Its guest may have given up by itself by now, which says why; what is not to be is that it cannot be ended.
    let _ = offender.verb(["kill", &offender.id, "KILL"]);
    let outcome = bombs.wait();
    assert!(matches!(outcome.code(), Some(125 | 137)), "{outcome}");
    offender.expect_nothing_left();
    neighbour.exec(&[], ["echo", "unharmed"]).expect_stdout("unharmed\n");
    container.end();
}

/// The cgroups of the host that hold a sandbox with `linux.cgroupsPath`, where processor time is under their control.
struct ProcessorTime {
    /// Where the limit is written, and what a hundredth of a second in a tenth is there.
    limit: (PathBuf, &'static str),
    used: PathBuf,
}

impl ProcessorTime {
    fn of(id: &str) -> Option<Self> {
        let of = |file: &str| {
            leaks::cgroups_named(id).into_iter().map(|path| path.join(file)).find(|path| path.exists())
        };
        let limit = of("cpu.max")
            .map(|path| (path, "10000 100000"))
            .or_else(|| of("cpu.cfs_quota_us").map(|path| (path, "10000")))?;
        let used =
            of("cpuacct.usage").or_else(|| limit.0.exists().then(|| limit.0.with_file_name("cpu.stat")))?;
        Some(Self { limit, used })
    }

    /// Allows a tenth of one processor.
    fn limit(&self) {
        let (path, tenth) = &self.limit;
        fs::write(path, tenth).unwrap();
    }

    fn used(&self) -> Duration {
        let text = fs::read_to_string(&self.used).unwrap();
        match text.lines().find_map(|line| line.strip_prefix("usage_usec ")) {
            Some(micros) => Duration::from_micros(micros.parse().unwrap()),
            None => Duration::from_nanos(text.trim().parse().unwrap()),
        }
    }
}

/// A sandbox in a cgroup of its own.
fn grouped(name: &str, script: &str) -> Sandbox {
    let sandbox = sandbox(name).command(["sh", "-c", script]);
    let path = format!("/{}", sandbox.id);
    sandbox.config(|config| config["linux"]["cgroupsPath"] = path.into())
}

#[test]
fn a_bomb_has_no_more_of_the_processors_than_its_cgroup_and_a_neighbour_works() {
    const WORK: Duration = Duration::from_secs(1);
    let offender = grouped("bomb-in-cgroup", BOMBS)
        .config(|config| config["linux"]["resources"]["memory"]["limit"] = (96u64 << 20).into());
    let neighbour = grouped("beside-bomb", "echo ready; while :; do :; done");
    let mut bomb = offender.create();
    let Some(of_bomb) = ProcessorTime::of(&offender.id) else {
        bomb.end();
        return skip("a_bomb_has_no_more_of_the_processors", "no cgroup controls processor time here");
    };
    of_bomb.limit();
    offender.on("start", []).expect_code(0);
    bomb.wait_for_stdout("ready");
    let mut working = neighbour.start();
    working.wait_for_stdout("ready");
    let of_neighbour = ProcessorTime::of(&neighbour.id).unwrap();
    let (begin, bomb_before, before) = (Instant::now(), of_bomb.used(), of_neighbour.used());
    while of_neighbour.used() - before < WORK {
        assert!(begin.elapsed() < patience(), "the neighbour has got {:?}", of_neighbour.used() - before);
        std::thread::sleep(POLL);
    }
    // A tenth, and a period of it that may have begun before.
    let (passed, used) = (begin.elapsed(), of_bomb.used() - bomb_before);
    assert!(used <= passed / 10 + Duration::from_millis(200), "{used:?} of {passed:?}");
    let of_neighbour = of_neighbour.used() - before;
    assert!(of_neighbour >= used, "the neighbour had {of_neighbour:?}, the bomb {used:?}");
    working.end();
    bomb.end();
}

#[test]
fn files_without_end_run_out_for_the_guest_and_for_nobody_else() {
    const FILES: usize = 600;
    const DESCRIPTORS: u64 = 512;
    /// Of `linux/capability.h`.
    const CAP_SYS_RESOURCE: libc::c_ulong = 24;
    let sandbox = sandbox("many-files");
    let many = sandbox.bundle.root("many");
    fs::create_dir(&many).unwrap();
    for number in 0..FILES {
        fs::write(many.join(number.to_string()), "x").unwrap();
    }
    let script = "probe hold /many && read line && echo $line";
    let mut command = sandbox.run_command(sandbox.bundle.path(), ["sh", "-c", script]);
    let limit = libc::rlimit { rlim_cur: DESCRIPTORS, rlim_max: DESCRIPTORS };
    // SAFETY: between fork and exec, two system calls, of which one reads a structure of the closure's own. Nothing
    // that is run has the capability to go beyond the limit.
    unsafe {
        command.pre_exec(move || {
            let limited = libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
            match limited | libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let mut run = Process::spawn(&mut command);
    run.wait_for_stdout("held");
    // Its streams, and what the runtime asks, have descriptors of their own.
    let machine = sandbox.verb(["check", "--security", &sandbox.id]).expect_code(0);
    assert!(machine.out().contains("sandbox-vmm"), "{machine}");
    run.write(b"goes on\n");
    let outcome = run.wait().expect_code(0);
    let fewer = outcome.out().contains("Too many open files") && outcome.out().ends_with("goes on\n");
    assert!(fewer, "{outcome}");
}

#[test]
fn a_console_that_is_flooded_is_bounded() {
    const PER_SECOND: u64 = 256 << 10;
    // An exit for each character takes the machine on KVM long in the lab.
    let flood = if machine() == "kvm" { 32 << 10 } else { 2 << 20 };
    let mut script = Script::new();
    script.repeat(b'x', flood);
    script.say("\nthe end\n");
    let begin = Instant::now();
    let console = bare::run(script, |_, _| {});
    let seconds = begin.elapsed().as_secs() + 2;
    let notes = |line: &&str| line.ends_with("bytes of console output dropped]");
    let dropped: u64 = console
        .lines()
        .filter(notes)
        .map(|line| line.trim_start_matches('[').split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    let written = console.bytes().filter(|byte| *byte == b'x').count() as u64;
    assert!(written <= PER_SECOND * seconds, "{written} bytes in {seconds} s");
    assert!(written + dropped <= u64::from(flood) + 100, "{written} and {dropped} of {flood}");
    if console.ends_with("the end\n") {
        assert!(written + dropped >= u64::from(flood), "{written} and {dropped} of {flood}");
    }
}

#[test]
fn a_volume_that_is_filled_is_full_for_the_guest_and_nobody_else() {
    let sandbox = sandbox("filler");
    let volume = sandbox.directory().join("volume");
    fs::create_dir(&volume).unwrap();
    mount("tmpfs", &volume, "tmpfs", MountFlags::empty(), Some(c"size=1m,nr_inodes=100"))
        .expect("the tests run as root");
    let sandbox = sandbox.mount("/mnt", "bind", &volume, &["rbind", "rw"]);
    let script = "dd if=/dev/zero of=/mnt/file bs=64k 2>&1 | grep -o 'No space left'; rm /mnt/file; \
                  i=0; while mkdir /mnt/$i 2>/why; do i=$((i+1)); done; grep -o 'No space left' /why; \
                  test $i -gt 50 && test $i -lt 100 && echo bounded; rmdir /mnt/*; echo again >/mnt/file && cat /mnt/file";
    let outcome = sandbox.run(["sh", "-c", script]);
    unmount(&volume, UnmountFlags::DETACH).unwrap();
    outcome.expect_stdout("No space left\nNo space left\nbounded\nagain\n");
}

/// The least time that so much takes, of which the first second's worth is there at once.
fn least(amount: u64, per_second: u64) -> Duration {
    Duration::from_secs_f64((amount - per_second) as f64 / per_second as f64)
}

#[test]
fn a_device_with_a_limit_does_no_more_than_that() {
    const BYTES: u64 = 8 << 20;
    const PER_SECOND: u64 = 2 << 20;
    let sandbox = sandbox("limited").config(|config| {
        config["annotations"] = json!({"dev.sandbox.rate.files": "bytes=2M"});
    });
    fs::write(sandbox.bundle.root("large"), vec![1; BYTES as usize]).unwrap();
    let begin = Instant::now();
    sandbox.run(["sh", "-c", "cat /large | wc -c"]).expect_stdout(&format!("{BYTES}\n"));
    assert!(begin.elapsed() >= least(BYTES, PER_SECOND), "{:?} for {BYTES} bytes", begin.elapsed());
    // The others are what they were.
    let streams = sandbox.run(["sh", "-c", "head -c 4000000 /dev/zero"]).expect_code(0);
    assert_eq!(streams.stdout.len(), 4_000_000);
}

#[test]
fn operations_and_streams_have_limits_of_their_own() {
    const FILES: u64 = 1200;
    const BYTES: u64 = 3_000_000;
    let sandbox = sandbox("limited-twice").config(|config| {
        config["annotations"] = json!({
            "dev.sandbox.rate.files": "operations=600",
            "dev.sandbox.rate.streams": "bytes=1000000",
        });
    });
    let begin = Instant::now();
    // A file is one request at least, and more in fact.
    let script = format!("i=0; while [ $i -lt {FILES} ]; do : >/$i; i=$((i + 1)); done");
    sandbox.run(["sh", "-c", &script]).expect_stdout("");
    let took = begin.elapsed();
    assert!(took >= least(FILES, 600), "{took:?} for {FILES} files");
    let begin = Instant::now();
    let outcome = sandbox.run(["head", "-c", &BYTES.to_string(), "/dev/zero"]).expect_code(0);
    assert_eq!(outcome.stdout.len() as u64, BYTES);
    assert!(begin.elapsed() >= least(BYTES, 1_000_000), "{:?} for {BYTES} bytes", begin.elapsed());
}

#[test]
fn a_network_has_a_limit_or_is_refused_one() {
    const BYTES: u64 = 6_000_000;
    let net = Net::new();
    net.join(0);
    let sandbox = sandbox("limited-net").network(&net.inside).config(|config| {
        config["annotations"] = json!({"dev.sandbox.rate.network": "bytes=2000000"});
    });
    if machine() == "qemu" {
        return drop(sandbox.run(["true"]).expect_error(125, &["no limit for network interfaces", "tc"]));
    }
    let server = net.outside.listen("198.18.0.1:6000");
    let begin = Instant::now();
    let script = format!("head -c {BYTES} /dev/zero | nc 198.18.0.1 6000");
    let run = Process::spawn(&mut sandbox.run_command(sandbox.bundle.path(), ["sh", "-c", &script]));
    assert_eq!(answer(server.accept(), b"").len() as u64, BYTES);
    assert!(begin.elapsed() >= least(BYTES, 2_000_000), "{:?} for {BYTES} bytes", begin.elapsed());
    run.wait().expect_code(0);
}

#[test]
fn a_limit_that_makes_no_sense_is_refused() {
    let sandbox = sandbox("limitless").config(|config| {
        config["annotations"] = json!({"dev.sandbox.rate.files": "fast"});
    });
    sandbox.run(["true"]).expect_error(125, &["annotations.dev.sandbox.rate.files", "operations=NUMBER"]);
}
