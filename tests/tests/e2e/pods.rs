//! Pods: several containers in one virtual machine, which come and go while it runs.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_tests::place::patience;
use sandbox_tests::process::{POLL, Process};
use sandbox_tests::{Sandbox, leaks, sandbox};
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];

#[test]
fn what_pods_share_is_shared_and_nothing_else() {
    let pod = sandbox("pod-shared").pod();
    let memory = SharedMemory::of(&pod);
    let pod = pod.mount("/dev/shm", "bind", memory.path(), &["rbind", "rw"]);
    let first = pod.start();
    let member = |name: &str| {
        pod.member(name, &first, ["sh", "-c", "exec sleep 2000"]).config(|config| {
            let shm = |mount: &&mut Value| mount["destination"] == "/dev/shm";
            let mount = config["mounts"].as_array_mut().unwrap().iter_mut().find(shm).unwrap();
            *mount = json!({"destination": "/dev/shm", "type": "bind", "source": memory.path(), "options": ["rbind"]});
        })
    };
    let (a, b) = (member("a"), member("b"));
    fs::write(a.bundle.root("who"), "a").unwrap();
    fs::write(b.bundle.root("who"), "b").unwrap();
    let (in_a, in_b) = (a.start(), b.start());
    // Shared: names, System V and POSIX objects, the network.
    assert_eq!((a.sh("hostname").out(), b.sh("hostname").out()), ("pod\n".into(), "pod\n".into()));
    a.sh("touch /dev/mqueue/queue; echo in memory > /dev/shm/it").expect_code(0);
    b.sh("ls /dev/mqueue; cat /dev/shm/it").expect_stdout("queue\nin memory\n");
    pod.exec(&[], ["ls", "/dev/mqueue", "/dev/shm"]).expect_stdout("/dev/mqueue:\nqueue\n\n/dev/shm:\nit\n");
    assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0, "the pod's memory is the guest's");
    let listener = "echo over the loopback | nc -l -p 7000";
    let mut listens = Process::spawn(&mut pod.verb_command(["exec", &a.id, "sh", "-c", listener]));
    let heard = b.sh("until nc 127.0.0.1 7000 </dev/null 2>/dev/null; do sleep 0.1; done").out();
    assert_eq!(heard, "over the loopback\n");
    listens.wait_alone();
    // Not shared: files, process ids, cgroups.
    assert_eq!((a.sh("cat /who").out(), b.sh("cat /who").out()), ("a".into(), "b".into()));
    a.sh("echo written > /mine").expect_code(0);
    assert_eq!(fs::read_to_string(a.bundle.root("mine")).unwrap(), "written\n");
    b.sh("ls /mine").expect_code(1);
    for member in [&a, &b] {
        let processes = member.sh("cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l").expect_code(0).out();
        assert!(processes.starts_with("sleep\n"), "{processes}");
        let listed: Vec<u32> =
            serde_json::from_slice(&member.on("ps", ["--format", "json"]).stdout).expect("a list of ids");
        assert_eq!(listed.len(), 1);
    }
    let mounts = a.sh("cat /proc/self/mountinfo").out();
    assert!(!mounts.contains(&b.id) && !mounts.contains("/run/sandbox"), "{mounts}");
    a.end(&in_a);
    b.end(&in_b);
    first.end();
}

#[test]
fn each_container_has_streams_verbs_and_an_end_of_its_own() {
    let pod = sandbox("pod-own").pod();
    let first = pod.start();
    let a =
        pod.member("a", &first, ["sh", "-c", "echo out-a; echo err-a >&2; read line; echo $line; exit 7"]);
    let b = pod.member(
        "b",
        &first,
        ["sh", "-c", "trap 'echo got-usr1' USR1; echo out-b; while :; do sleep 0.1; done"],
    );
    let (mut in_a, mut in_b) = (a.create(), b.create());
    assert_eq!(
        (a.status(), b.status(), pod.status()),
        ("created".into(), "created".into(), "running".into())
    );
    a.on("start", []).expect_code(0);
    in_a.streams.wait_for_stdout("out-a");
    assert_eq!((a.status(), b.status()), ("running".into(), "created".into()));
    b.on("start", []).expect_code(0);
    in_b.streams.wait_for_stdout("out-b");
    // A signal reaches one of them, by its verb or by the process that stands for it.
    b.on("kill", ["USR1"]).expect_code(0);
    in_b.streams.wait_for_stdout("got-usr1");
    in_b.stand_in.signal(Signal::SIGUSR1);
    let twice = |text: &str| text.matches("got-usr1").count() == 2;
    wait_until("the second signal arrives", || twice(&in_b.streams.so_far().0));
    // One is held, the others go on.
    b.on("pause", []).expect_code(0);
    assert_eq!((a.status(), b.status()), ("running".into(), "paused".into()));
    assert_eq!(a.sh("echo lives").out(), "lives\n");
    b.on("resume", []).expect_code(0);
    // Limits and numbers are those of one.
    pod.verb(["update", "--pids-limit", "77", &b.id]).expect_code(0);
    assert_eq!(b.sh("cat /sys/fs/cgroup/pids.max").out(), "77\n");
    assert_eq!(a.sh("cat /sys/fs/cgroup/pids.max").out(), "max\n");
    let stats: Value = serde_json::from_slice(&pod.verb(["events", "--stats", &b.id]).stdout).unwrap();
    assert_eq!((stats["id"].as_str(), stats["data"]["pids"]["limit"].as_i64()), (Some(&*b.id), Some(77)));
    in_a.streams.write(b"in\n");
    assert_eq!(in_a.stand_in.wait(), 7);
    let outcome = in_a.streams.wait();
    assert_eq!((outcome.out(), outcome.err()), ("out-a\nin\n".into(), "err-a\n".into()));
    assert_eq!(
        (a.status(), b.status(), pod.status()),
        ("stopped".into(), "running".into(), "running".into())
    );
    let ids = pod.verb(["list", "--quiet"]).out();
    for id in [&pod.id, &a.id, &b.id] {
        assert!(ids.lines().any(|line| line == id), "{ids}");
    }
    a.on("delete", []).expect_code(0);
    a.on("state", []).expect_error(1, &["container does not exist"]);
    b.on("delete", []).expect_error(1, &["not stopped: running"]);
    b.on("delete", ["--force"]).expect_code(0);
    assert_eq!(in_b.stand_in.wait(), 137);
    assert_eq!(pod.status(), "running");
    first.end();
}

#[test]
fn a_container_is_deleted_and_made_again_many_times() {
    let pod = sandbox("pod-again").pod();
    let first = pod.start();
    let other = pod.member("other", &first, ["sh", "-c", "echo ready; exec sleep 1000"]);
    let in_other = other.start();
    let volume = pod.directory().join("volume");
    fs::create_dir(&volume).unwrap();
    chown(&volume, Some(4000), Some(4000)).unwrap();
    let again =
        pod.member("again", &first, ["sh", "-c", "cat /file >> /volume/lines; cat /etc/passwd >/dev/null"]);
    let again = again.config(|config| {
        let ids = json!([{"containerID": 4000, "hostID": 0, "size": 1}]);
        let mount = json!({"destination": "/volume", "type": "bind", "source": volume, "options": ["rbind", "rw"],
            "uidMappings": ids, "gidMappings": ids});
        config["mounts"].as_array_mut().unwrap().push(mount);
        let script = "echo hook >>rootfs/volume/hooks";
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]});
        config["hooks"] = json!({"createContainer": [hook]});
    });
    for round in 0..20 {
        // Another file system each time, as an engine makes it.
        fs::write(again.bundle.root("file"), format!("round {round}\n")).unwrap();
        let joined = again.start();
        assert_eq!(joined.stand_in.wait(), 0, "round {round}");
        again.on("delete", []).expect_code(0);
        expect_let_go(&pod, again.bundle.path());
    }
    let expected: String = (0..20).map(|round| format!("round {round}\n")).collect();
    assert_eq!(fs::read_to_string(volume.join("lines")).unwrap(), expected);
    assert_eq!(fs::read_to_string(volume.join("hooks")).unwrap(), "hook\n".repeat(20));
    // What root of the container and root of the host write there belongs to whom the mount says.
    for file in ["lines", "hooks"] {
        assert_eq!(fs::metadata(volume.join(file)).unwrap().uid(), 4000, "{file}");
    }
    expect_let_go(&pod, &volume);
    assert_eq!(other.status(), "running");
    other.end(&in_other);
    first.end();
}

#[test]
fn containers_share_process_ids_where_they_are_told_to() {
    let pod = sandbox("pod-pids").pod();
    let first = pod.start();
    let pod_pid = first.monitor.pid().as_raw();
    let server = pod.member("server", &first, ["sh", "-c", "exec sleep 3000"]);
    let in_server = server.start();
    // With the whole pod, and, as one does to look into a container, with one of them.
    let sidecar = pod.member("sidecar", &first, SLEEP).sharing_pids_of(pod_pid);
    let in_sidecar = sidecar.start();
    let debugger = pod.member("debugger", &first, SLEEP).sharing_pids_of(in_server.stand_in.pid().as_raw());
    let in_debugger = debugger.start();
    const COMMANDS: &str = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
    let seen = pod.exec(&[], ["sh", "-c", COMMANDS]).out();
    assert!(seen.contains("sleep 1000 ") && seen.matches("sleep 1000").count() == 2, "{seen}");
    let seen = sidecar.sh("cat /proc/1/cmdline; cat /proc/1/cgroup").out();
    assert!(seen.contains("sleep"), "{seen}");
    let seen = debugger.sh(COMMANDS).out();
    assert!(seen.contains("sleep 3000") && seen.contains("sleep 1000"), "{seen}");
    assert!(server.sh(COMMANDS).out().contains("sleep 1000"), "the debugger is seen, too");
    debugger.sh("cat /proc/1/root/etc/passwd").expect_code(0);
    // Process 1 of a namespace takes the others in it along.
    server.on("kill", ["KILL"]).expect_code(0);
    assert_eq!(in_server.stand_in.wait(), 137);
    assert_eq!(in_debugger.stand_in.wait(), 137);
    assert_eq!(sidecar.status(), "running");
    for member in [&server, &debugger] {
        member.on("delete", []).expect_code(0);
    }
    sidecar.end(&in_sidecar);
    first.end();
}

#[test]
fn the_end_of_the_first_container_is_the_end_of_all() {
    let pod = sandbox("pod-end").pod();
    let first = pod.start();
    let (a, b) = (pod.member("a", &first, SLEEP), pod.member("b", &first, SLEEP));
    let (in_a, in_b) = (a.start(), b.create());
    first.end();
    for (member, joined) in [(&a, &in_a), (&b, &in_b)] {
        assert_eq!(joined.stand_in.wait(), 137);
        assert_eq!(member.status(), "stopped");
        member.on("start", []).expect_error(1, &["stopped"]);
        member.on("delete", []).expect_code(0);
    }
    a.create_in_vain().expect_error(1, &["container does not exist", &pod.id]);
    pod.expect_nothing_left();
    // All names are free again.
    let first = pod.start();
    let a = pod.member("a2", &first, SLEEP);
    let in_a = a.start();
    a.end(&in_a);
    first.end();
}

#[test]
fn what_cannot_join_is_refused_and_leaves_nothing() {
    let pod = sandbox("pod-bad").pod();
    let first = pod.start();
    let pid = first.monitor.pid().as_raw();
    let good = pod.member("good", &first, SLEEP);
    let in_good = good.start();
    let bad = |name: &str, change: fn(&mut Value)| pod.member(name, &first, SLEEP).config(change);
    for (member, expected) in [
        (
            bad("stranger", |config| config["annotations"]["io.kubernetes.cri.sandbox-id"] = "nobody".into()),
            "container does not exist",
        ),
        (
            bad("kind", |config| config["annotations"]["io.kubernetes.cri.container-type"] = "pod".into()),
            "annotations.io.kubernetes.cri.container-type",
        ),
        (
            bad("ours", |config| {
                config["linux"]["namespaces"][0] = json!({"type": "pid", "path": "/proc/1/ns/pid"});
            }),
            "linux.namespaces[0].path",
        ),
        (
            bad("mounts", |config| {
                config["linux"]["namespaces"][0] = json!({"type": "mount", "path": "/proc/1/ns/mnt"});
            }),
            "linux.namespaces",
        ),
        (
            bad("twice", |config| {
                config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "ipc"}));
            }),
            "`ipc` is there twice",
        ),
    ] {
        member.create_in_vain().expect_error(1, &[expected]);
        member.on("state", []).expect_error(1, &["container does not exist"]);
    }
    let below = pod.member("below", &first, SLEEP).config(|config| {
        config["annotations"]["io.kubernetes.cri.sandbox-id"] = good.id.clone().into();
    });
    below.create_in_vain().expect_error(1, &["not the first of a pod"]);
    good.create_in_vain().expect_error(1, &["container with id exists"]);
    // What fails in the guest leaves nothing there, and its name is free.
    let lost = pod.member("lost", &first, ["/no/such/program"]);
    let joined = lost.create_in_vain();
    joined.expect_error(1, &["/no/such/program"]);
    lost.on("state", []).expect_error(1, &["container does not exist"]);
    expect_let_go(&pod, lost.bundle.path());
    let found = lost.config(|config| config["process"]["args"] = json!(["echo", "found"]));
    let joined = found.start();
    assert_eq!(joined.stand_in.wait(), 0);
    assert_eq!(joined.streams.wait().out(), "found\n");
    found.on("delete", []).expect_code(0);
    assert!(kill(Pid::from_raw(pid), None).is_ok());
    good.end(&in_good);
    first.end();
}

#[test]
fn read_only_is_the_hosts_word_for_a_container_that_joins() {
    let pod = sandbox("pod-read-only").pod();
    let first = pod.start();
    let volume = pod.directory().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "kept").unwrap();
    let member = pod.member("reader", &first, SLEEP).config(|config| {
        let mount =
            json!({"destination": "/volume", "type": "bind", "source": volume, "options": ["rbind", "ro"]});
        config["mounts"].as_array_mut().unwrap().push(mount);
        let capabilities = json!(["CAP_SYS_ADMIN"]);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = capabilities.clone();
        }
    });
    let joined = member.start();
    // Its own word for it means nothing.
    member.sh("mount -o remount,bind,rw /volume; echo broken > /volume/file").expect_code(1);
    member.sh("mount -o remount,bind,rw /volume; touch /volume/new").expect_code(1);
    assert_eq!(fs::read_to_string(volume.join("file")).unwrap(), "kept");
    member.end(&joined);
    first.end();
}

#[test]
fn whatever_is_killed_nothing_is_left() {
    let pod = sandbox("pod-killed").pod();
    for target in ["the member's stand-in", "the pod's stand-in", " monitor", "sandbox-vmm"] {
        let first = pod.start();
        let name = target.trim().replace([' ', '\''], "-");
        let member = pod.member(&name, &first, SLEEP);
        let joined = member.start();
        match target {
            "the member's stand-in" => {
                joined.stand_in.signal(Signal::SIGKILL);
                assert_eq!(joined.stand_in.wait(), 137);
                wait_until("the member stops", || member.status() == "stopped");
                expect_let_go(&pod, member.bundle.path());
                assert_eq!(pod.status(), "running");
                first.end();
            }
            "the pod's stand-in" => {
                first.monitor.signal(Signal::SIGKILL);
                assert_eq!(first.monitor.wait(), 137);
                assert_eq!(joined.stand_in.wait(), 137);
            }
            program => {
                let (process, _) = find(&pod, program).expect("it runs");
                kill(process, Signal::SIGKILL).unwrap();
                assert_ne!(first.monitor.wait(), 0);
                assert_eq!(joined.stand_in.wait(), 137);
            }
        }
        assert_eq!(member.status(), "stopped", "{target}");
        member.on("delete", []).expect_code(0);
        pod.verb(["delete", "--force", &pod.id]).expect_code(0);
        pod.expect_nothing_left();
    }
}

#[test]
fn a_create_that_is_killed_leaves_no_container_in_the_pod() {
    let pod = sandbox("pod-create-killed").pod();
    let first = pod.start();
    for (round, delay) in [0, 5, 20, 60, 150].into_iter().enumerate() {
        let member = pod.member(&format!("m{round}"), &first, SLEEP);
        let mut create = Process::spawn(&mut member.create_command());
        std::thread::sleep(std::time::Duration::from_millis(delay));
        create.signal(Signal::SIGKILL);
        create.wait_alone();
        wait_until("what was made is gone or stands", || {
            let outcome = member.on("state", []);
            outcome.code() != Some(0)
                || outcome.out().contains("\"created\"")
                || outcome.out().contains("stopped")
        });
        member.on("delete", ["--force"]).expect_code(0);
        expect_let_go(&pod, member.bundle.path());
    }
    assert_eq!(pod.status(), "running");
    first.end();
}

/// What the process of a pod's machine holds of a directory: open files, and mounts.
fn held_by_machine(pod: &Sandbox, directory: &Path) -> Vec<String> {
    let (machine, _) = find(pod, "sandbox-vmm").expect("a machine");
    let proc = PathBuf::from(format!("/proc/{machine}"));
    // Of the path, as much as is unique: the mount may be that of a file system mounted below the root.
    let path: PathBuf = directory.iter().skip(directory.iter().count() - 2).collect();
    let is_of_it = |line: &&str| line.contains(path.to_str().expect("a plain path"));
    let mounts = fs::read_to_string(proc.join("mountinfo")).expect("its mounts can be read");
    let mut held: Vec<String> = mounts.lines().filter(is_of_it).map(str::to_owned).collect();
    for entry in fs::read_dir(proc.join("fd")).expect("its files can be listed").flatten() {
        // The names are those of its own root; what a file is on the host, only the file itself tells.
        let Ok(metadata) = fs::metadata(entry.path()) else { continue };
        if is_below(directory, &metadata) {
            held.push(format!(
                "{} ({})",
                entry.path().display(),
                fs::read_link(entry.path()).unwrap_or_default().display()
            ));
        }
    }
    held
}

/// Waits until the machine's process holds nothing of a directory: the guest's kernel lets go when it has time.
#[track_caller]
fn expect_let_go(pod: &Sandbox, directory: &Path) {
    let deadline = Instant::now() + patience();
    loop {
        let held = held_by_machine(pod, directory);
        if held.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "the machine still holds {held:#?}");
        std::thread::sleep(POLL);
    }
}

/// Whether a file is one of those in a directory.
fn is_below(directory: &Path, file: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    let mut places = vec![directory.to_owned()];
    while let Some(place) = places.pop() {
        let Ok(metadata) = fs::symlink_metadata(&place) else { continue };
        if (metadata.dev(), metadata.ino()) == (file.dev(), file.ino()) {
            return true;
        }
        if metadata.is_dir() {
            places.extend(fs::read_dir(&place).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    false
}

fn find(pod: &Sandbox, program: &str) -> Option<(Pid, String)> {
    leaks::processes(&pod.trace()).into_iter().find(|(_, command)| command.contains(program))
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience();
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(POLL);
    }
}

/// A directory in the host's memory, as an engine makes one for the shared memory of a pod.
struct SharedMemory(PathBuf);

impl SharedMemory {
    fn of(pod: &Sandbox) -> Self {
        let directory = Path::new("/dev/shm").join(&pod.id);
        fs::create_dir_all(directory.join("shm")).expect("/dev/shm is in memory");
        Self(directory)
    }

    fn path(&self) -> PathBuf {
        self.0.join("shm")
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
