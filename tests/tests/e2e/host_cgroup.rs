//! `linux.cgroupsPath`: the cgroup of the host in which engines look for a sandbox's processes.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use sandbox_tests::{Sandbox, leaks, sandbox, skip};

/// A sandbox with a cgroup of its own on the host.
fn grouped(name: &str) -> Sandbox {
    let sandbox = sandbox(name).command(["sleep", "1000"]);
    let path = format!("/{}", sandbox.id);
    sandbox.config(|config| config["linux"]["cgroupsPath"] = path.into())
}

/// Whether a process is in the sandbox's cgroup, in every hierarchy that has controllers or is of version 2.
fn is_inside(sandbox: &Sandbox, pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    // A hierarchy that is not mounted, or a named one, is nobody's to use.
    let mounted = |line: &&str| {
        let controllers = line.split(':').nth(1).unwrap_or_default();
        let name = if controllers.is_empty() { "unified" } else { controllers };
        Path::new("/sys/fs/cgroup").join(name).is_dir()
            || (controllers.is_empty() && Path::new("/sys/fs/cgroup/cgroup.controllers").exists())
    };
    let lines: Vec<&str> = text.lines().filter(mounted).collect();
    assert!(!lines.is_empty(), "this host has no cgroups: {text}");
    lines.iter().all(|line| line.ends_with(&format!(":/{}", sandbox.id)))
}

#[test]
fn it_holds_the_monitor_and_the_machine_and_goes_with_the_container() {
    let sandbox = grouped("cgroup");
    let container = sandbox.create();
    let processes = leaks::processes(&sandbox.trace());
    assert!(processes.iter().any(|(_, command)| command.contains("sandbox-vmm")), "{processes:?}");
    assert!(processes.iter().any(|(pid, _)| *pid == container.monitor.pid()), "{processes:?}");
    for (pid, command) in processes {
        assert!(is_inside(&sandbox, pid.as_raw()), "{command} is elsewhere");
    }
    sandbox.on("start", []).expect_code(0);
    container.end();
    sandbox.expect_clean_and_usable();
}

#[test]
fn it_bounds_the_memory_of_the_machine_and_leaves_room_for_what_runs_it() {
    let sandbox = grouped("cgroup-memory")
        .config(|config| config["linux"]["resources"]["memory"]["limit"] = (128u64 << 20).into());
    let container = sandbox.create();
    let hierarchies = leaks::cgroups_named(&sandbox.id);
    let limits: Vec<u64> = hierarchies
        .iter()
        .flat_map(|path| [path.join("memory.max"), path.join("memory.limit_in_bytes")])
        .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
        .collect();
    let [limit] = limits[..] else {
        container.end();
        return skip("it_bounds_the_memory_of_the_machine", "memory is not under control of cgroups here");
    };
    assert!((600 << 20..900 << 20).contains(&limit), "{limit}");
    container.end();
}

#[test]
fn it_goes_when_the_monitor_was_killed_and_when_the_container_could_not_be_made() {
    let sandbox = grouped("cgroup-killed");
    let container = sandbox.start();
    container.monitor.signal(Signal::SIGKILL);
    assert_eq!(container.monitor.wait(), 137);
    // The kernel ends the rest of it.
    sandbox.wait_for_status("stopped");
    sandbox.on("delete", []).expect_code(0);
    sandbox.expect_nothing_left();
    let sandbox =
        sandbox.config(|config| config["process"]["user"]["additionalGids"] = vec![1; 100_000].into());
    sandbox.create_in_vain().expect_code(1);
    sandbox.expect_nothing_left();
}

#[test]
fn it_goes_after_a_run() {
    let sandbox = grouped("cgroup-run");
    sandbox.run(["echo", "x"]).expect_stdout("x\n");
    sandbox.expect_clean_and_usable();
}

#[test]
fn it_is_not_made_where_nobody_is_to() {
    let sandbox = grouped("cgroup-none").option("--cgroup-manager", "disabled");
    let container = sandbox.start();
    assert!(!is_inside(&sandbox, container.monitor.pid().as_raw()));
    assert!(leaks::cgroups_named(&sandbox.id).iter().all(|path| !path.exists()));
    container.end();
}

#[test]
fn a_path_that_leads_elsewhere_is_refused() {
    for path in ["/../x", "/a/../../x", "slice:prefix:name"] {
        let sandbox = sandbox("cgroup-path").config(|config| config["linux"]["cgroupsPath"] = path.into());
        sandbox.create_in_vain().expect_error(1, &["linux.cgroupsPath", path]);
    }
}
