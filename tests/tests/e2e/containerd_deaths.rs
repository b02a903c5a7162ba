//! Somebody dies between containerd and its containers, and nothing is left that nobody knows of.

use nix::sys::signal::{Signal, kill};
use sandbox_tests::Containerd;
use sandbox_tests::containerd::SHIM;

const SERVICE: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

#[test]
fn a_containerd_that_comes_back_finds_its_containers() {
    let Some(mut containerd) = Containerd::new("ctr-restart") else { return };
    containerd.detach("stays", SERVICE);
    containerd.detach("ends", "sleep 1; exit 6");
    containerd.kill();
    std::thread::sleep(std::time::Duration::from_secs(3));
    containerd.start();
    assert_eq!(containerd.status("stays").as_deref(), Some("RUNNING"));
    containerd.exec("stays", "one", "echo still there").expect_stdout("still there\n");
    containerd.wait_for_status("ends", Some("STOPPED"));
    containerd.remove("ends", 6);
    containerd.end("stays");
}

#[test]
fn a_shim_that_is_killed_leaves_nothing() {
    let Some(containerd) = Containerd::new("ctr-shim") else { return };
    for _ in 0..2 {
        containerd.detach("box", SERVICE);
        let shims = containerd.processes(&format!("{SHIM} -namespace"));
        assert_eq!(shims.len(), 1);
        kill(shims[0], Signal::SIGKILL).expect("it runs");
        containerd.wait_for_status("box", None);
        containerd.expect_no_sandbox();
        containerd.line("container rm box").expect_code(0);
    }
}

#[test]
fn output_that_nobody_reads_holds_up_no_kill() {
    let Some(containerd) = Containerd::new("ctr-unread") else { return };
    // The fifos of one that is detached lose their reader when `ctr` ends.
    containerd.run("box", "--detach", "while :; do echo more output; done").expect_code(0);
    assert_eq!(containerd.status("box").as_deref(), Some("RUNNING"));
    containerd.end("box");
}

#[test]
fn a_machine_that_is_killed_is_the_end_of_its_task() {
    let Some(containerd) = Containerd::new("ctr-machine") else { return };
    containerd.detach("box", SERVICE);
    let machines = containerd.processes("sandbox-vmm");
    assert!(!machines.is_empty());
    for machine in machines {
        // One may have ended with the other.
        let _ = kill(machine, Signal::SIGKILL);
    }
    containerd.wait_for_status("box", Some("STOPPED"));
    containerd.line("task rm box");
    containerd.line("container rm box").expect_code(0);
    containerd.run("box", "--rm", "echo again").expect_stdout("again\n");
}

#[test]
fn what_stands_for_a_container_is_killed() {
    let Some(containerd) = Containerd::new("ctr-stand-in") else { return };
    containerd.detach("box", SERVICE);
    let listed = containerd.line("task ps box").expect_code(0).out();
    let pid = listed.lines().nth(1).and_then(|line| line.split_whitespace().next()?.parse().ok());
    kill(nix::unistd::Pid::from_raw(pid.expect("a process")), Signal::SIGKILL).expect("it runs");
    containerd.wait_for_status("box", Some("STOPPED"));
    containerd.remove("box", 137);
}
