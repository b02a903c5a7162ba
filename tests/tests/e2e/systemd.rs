//! A whole Debian, whose first process is systemd.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use sandbox_tests::debian::{archive, unpack};
use sandbox_tests::place::{on_kvm, patience, skip};
use sandbox_tests::podman::{IMAGE, Podman};
use sandbox_tests::process::Process;
use sandbox_tests::systemd_host::SystemdHost;
use sandbox_tests::{Outcome, Sandbox, sandbox};
use serde_json::json;

/// What systemd asks for, besides what a container has anyway.
const CAPABILITIES: [&str; 13] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
    "CAP_SYS_NICE",
];

/// A service that leaves a file when it is started, and another when it is stopped.
const SERVICE: &str =
    "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=touch /started\nExecStop=touch /stopped\n";

/// A bundle as the guide describes it.
fn system(name: &str, archive: &std::path::Path) -> Sandbox {
    let base = sandbox(name).command(["/sbin/init"]).capable(&CAPABILITIES).writable_cgroups();
    let sandbox = base.config(|config| {
        config["process"]["noNewPrivileges"] = false.into();
        config["process"]["env"].as_array_mut().expect("a list").push("container=sandbox".into());
        let mounts = config["mounts"].as_array_mut().expect("a list");
        for (destination, mode) in [("/run", "mode=755"), ("/run/lock", "mode=1777"), ("/tmp", "mode=1777")] {
            let options = ["nosuid", "nodev", mode];
            let mount =
                json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options});
            mounts.push(mount);
        }
    });
    unpack(archive, &sandbox.bundle.root(""));
    let units = sandbox.bundle.root("etc/systemd/system");
    fs::write(units.join("probe.service"), SERVICE).expect("a file");
    fs::create_dir_all(units.join("multi-user.target.wants")).expect("a directory");
    symlink("../probe.service", units.join("multi-user.target.wants/probe.service")).expect("a link");
    sandbox
}

/// Waits until the system has started all that it was to start, well or not. At first there is nobody to answer.
fn wait_until_it_runs(ask: impl Fn() -> Outcome) {
    let deadline = Instant::now() + patience();
    loop {
        let outcome = ask();
        if ["running", "degraded"].contains(&outcome.out().trim()) {
            return;
        }
        assert!(Instant::now() < deadline, "the system does not come up: {outcome}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn it_boots_runs_services_in_cgroups_of_its_own_and_shuts_down() {
    let Some(archive) = archive("systemd") else { return };
    let sandbox = system("systemd", &archive);
    let container = sandbox.start();
    wait_until_it_runs(|| sandbox.exec(&[], ["systemctl", "is-system-running"]));
    sandbox.exec(&[], ["systemctl", "is-active", "multi-user.target"]).expect_stdout("active\n");
    assert!(sandbox.bundle.root("started").exists() && !sandbox.bundle.root("stopped").exists());
    let run = ["systemd-run", "--quiet", "--pipe", "--wait", "--property=MemoryMax=64M", "--unit=inner"];
    let script = "cat /proc/self/cgroup /sys/fs/cgroup/system.slice/inner.service/memory.max";
    let words: Vec<&str> = run.into_iter().chain(["sh", "-c", script]).collect();
    let outcome = Process::spawn(&mut sandbox.exec_command(&[], words)).wait();
    outcome.expect_stdout("0::/system.slice/inner.service\n67108864\n");
    sandbox.on("kill", ["SIGRTMIN+3"]).expect_code(0);
    assert_eq!(container.monitor.wait(), 0);
    assert!(sandbox.bundle.root("stopped").exists());
    sandbox.on("delete", []).expect_code(0);
}

#[test]
fn podman_runs_it_and_stops_it() {
    let Some(podman) = Podman::new("podman-systemd") else { return };
    let Some(archive) = archive("podman-systemd") else { return };
    let import = ["import", "--quiet", "--change", "CMD [\"/sbin/init\"]"];
    let words = import.into_iter().chain([archive.to_str().expect("a path"), "localhost/system"]);
    podman.podman(words).expect_code(0);
    podman.start_image("box", "--systemd=always", "localhost/system");
    wait_until_it_runs(|| podman.line("exec box systemctl is-system-running"));
    podman.line("exec box systemctl is-active multi-user.target").expect_stdout("active\n");
    // One that does not end by itself is killed, and gives 137.
    podman.line("stop --time 60 box").expect_code(0);
    podman.line("inspect box --format {{.State.ExitCode}}").expect_stdout("0\n");
    podman.line("rm box").expect_code(0);
}

#[test]
fn a_sandbox_is_a_scope_of_the_host_s_systemd() {
    if on_kvm() {
        return skip("systemd-scope", "the machine plays no part in it: tested on the software machine");
    }
    let Some(archive) = archive("systemd-scope") else { return };
    let sandbox = sandbox("systemd-scope").command(["sleep", "1000"]);
    let path = format!("tests-scopes.slice:sandbox:{}", sandbox.id);
    let sandbox = sandbox.config(|config| config["linux"]["cgroupsPath"] = path.into());
    let Some(host) = SystemdHost::boot("systemd-scope", &sandbox.directory().join("host"), &archive) else {
        return;
    };
    wait_until_it_runs(|| host.sh("systemctl is-system-running"));
    let unit = format!("sandbox-{}.scope", sandbox.id);
    let show = |property: &str| host.sh(&format!("systemctl show --value --property {property} {unit}"));
    let machine = sandbox_tests::place::machine();
    let (id, bundle) = (sandbox.id.clone(), sandbox.bundle.path().to_str().expect("a path").to_owned());
    let create = ["create", "--machine", &machine, "--bundle", &bundle, &id];
    host.sandbox(&sandbox, create).expect_code(0);
    host.sandbox(&sandbox, ["start", &sandbox.id]).expect_code(0);
    show("ActiveState").expect_stdout("active\n");
    show("Slice").expect_stdout("tests-scopes.slice\n");
    let bound: u64 = show("MemoryMax").out().trim().parse().expect("a number of bytes");
    assert!((600 << 20..2048 << 20).contains(&bound), "{bound}");
    // In the hierarchy of version 2, or in systemd's own of version 1.
    let script = format!(
        "at=$(systemctl show --value --property ControlGroup {unit})
        cd /sys/fs/cgroup/systemd$at 2>/dev/null || cd /sys/fs/cgroup$at || exit 1
        for pid in $(cat cgroup.procs); do cat /proc/$pid/comm; done"
    );
    let inside = host.sh(&script).expect_code(0).out();
    // What stands for it, its monitor and its machine.
    assert!(inside.lines().count() >= 3 && inside.contains("sandbox-vmm\n"), "{inside}");
    host.sandbox(&sandbox, ["kill", &sandbox.id, "KILL"]).expect_code(0);
    sandbox.wait_for_status("stopped");
    host.sandbox(&sandbox, ["delete", &sandbox.id]).expect_code(0);
    show("LoadState").expect_stdout("not-found\n");
    // What could not be made leaves no scope either.
    let broken = sandbox.config(|config| config["process"]["cwd"] = "/bin/sh".into());
    host.sandbox(&broken, create).expect_error(1, &["/bin/sh"]);
    show("LoadState").expect_stdout("not-found\n");
    let nowhere = broken.config(|config| config["linux"]["cgroupsPath"] = "/a/path".into());
    host.sandbox(&nowhere, create).expect_error(1, &["linux.cgroupsPath", "slice:prefix:name"]);
    podman_makes_scopes(&host);
    // Before the sandbox looks for what is left.
    drop(host);
}

/// Podman with systemd's cgroups, its default where systemd runs.
fn podman_makes_scopes(host: &SystemdHost) {
    let Some(podman) = Podman::new("podman-scope") else { return };
    // One mount namespace for all of it: Podman's storage is mounted in it.
    let script = format!(
        r#"set -e; export SYSTEMD_IGNORE_CHROOT=1
        "$@" run --detach --name box --network none --memory 64m {IMAGE} sleep 1000 >/dev/null
        unit=libpod-$("$@" inspect box --format '{{{{.Id}}}}').scope
        systemctl show --value --property ActiveState,Slice "$unit"
        "$@" exec box cat /sys/fs/cgroup/memory.max
        "$@" rm --force --time 0 box >/dev/null
        systemctl show --value --property LoadState "$unit""#
    );
    let command = podman.command(["--cgroup-manager", "systemd"]);
    host.script_about(&script, &command)
        .expect_code(0)
        .expect_line("active")
        .expect_line("machine.slice")
        .expect_line("67108864")
        .expect_line("not-found");
}
