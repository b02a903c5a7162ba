//! Workloads that take what they can get, with a neighbour beside them that goes on.

use std::fs;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sandbox_tests::sandbox;
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
    // The first second's worth is there at once.
    let least = Duration::from_secs((BYTES - PER_SECOND) / PER_SECOND);
    assert!(begin.elapsed() >= least, "{:?} for {BYTES} bytes", begin.elapsed());
    // The others are what they were.
    let streams = sandbox.run(["sh", "-c", "head -c 4000000 /dev/zero"]).expect_code(0);
    assert_eq!(streams.stdout.len(), 4_000_000);
}

#[test]
fn a_limit_that_makes_no_sense_is_refused() {
    let sandbox = sandbox("limitless").config(|config| {
        config["annotations"] = json!({"dev.sandbox.rate.files": "fast"});
    });
    sandbox.run(["true"]).expect_error(125, &["annotations.dev.sandbox.rate.files", "operations=NUMBER"]);
}
