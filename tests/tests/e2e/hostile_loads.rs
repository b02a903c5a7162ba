//! Workloads that take what they can get, with a neighbour beside them that goes on.

use std::fs;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sandbox_tests::sandbox;

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
