//! User namespaces: root of the container is an ordinary user of the virtual machine, and of the host's files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use sandbox_tests::{Podman, Sandbox, sandbox};
use serde_json::{Value, json};

/// What the container's root is outside.
const ROOT: u32 = 100_000;

/// Everything that a container may be allowed.
const MANY_CAPABILITIES: [&str; 8] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
];

/// A sandbox with a user namespace, whose root file system belongs to the container's root.
fn mapped(name: &str) -> Sandbox {
    let sandbox = sandbox(name).config(map).capable(&MANY_CAPABILITIES);
    give(&sandbox.bundle.root(""), ROOT);
    sandbox
}

fn map(config: &mut Value) {
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(json!({"type": "user"}));
    for ids in ["uidMappings", "gidMappings"] {
        config["linux"][ids] = json!([{"containerID": 0, "hostID": ROOT, "size": 65536}]);
    }
    config["process"]["noNewPrivileges"] = false.into();
}

fn give(path: &Path, id: u32) {
    let owner = format!("{id}:{id}");
    let done = Command::new("chown").arg("-hR").arg(owner).arg(path).status().expect("chown can be run");
    assert!(done.success());
}

#[test]
fn root_inside_is_an_ordinary_user_outside() {
    let sandbox = mapped("users").flag("--persist");
    fs::create_dir(sandbox.bundle.root("strangers")).expect("a directory");
    fs::create_dir(sandbox.bundle.root("others")).expect("a directory");
    chown(sandbox.bundle.root("others"), Some(ROOT + 5), Some(ROOT + 5)).expect("an owner");
    let script = "
        awk '{print \"map\", $1, $2, $3}' /proc/self/uid_map /proc/self/gid_map
        echo setgroups $(cat /proc/self/setgroups)
        echo id $(id -u) $(id -g) $(id -G)
        for path in / /bin/busybox /strangers /others /proc/self/ /dev /dev/pts /dev/shm /dev/null /sys; do
            echo owner $path $(stat -c %u:%g $path)
        done
        touch /made /others/made && chown 7:8 /others/made && mkdir /directory && ln -s made /link
        echo in $(stat -c %u:%g /made /others/made /directory)
        touch /strangers/made; echo strangers $?
        chown 70000 /made; echo unmapped $?
        mknod /node c 1 3; echo node $?
        echo >/dev/null && echo null is there
        mount -t tmpfs -o size=4k tmpfs /tmp && echo mounted
        date -s 2020-01-01 >/dev/null 2>&1; echo time $(($(date +%Y) > 2020))
        echo 1 2>/dev/null >/proc/sys/vm/overcommit_memory; echo machine $?
    ";
    let mut outcome = sandbox.run(["sh", "-c", script]).expect_code(0);
    for line in [
        "map 0 100000 65536",
        "setgroups allow",
        "id 0 0 0",
        "owner / 0:0",
        "owner /bin/busybox 0:0",
        "owner /strangers 65534:65534",
        "owner /others 5:5",
        "owner /proc/self/ 0:0",
        "owner /dev 0:0",
        "owner /dev/pts 0:0",
        "owner /dev/shm 0:0",
        "owner /dev/null 65534:65534",
        "owner /sys 65534:65534",
        "in 0:0 7:8 0:0",
        "strangers 1",
        "unmapped 1",
        "node 1",
        "null is there",
        "mounted",
        "time 1",
        "machine 1",
    ] {
        outcome = outcome.expect_line(line);
    }
    let owner = |path: &str| {
        let file = fs::symlink_metadata(sandbox.bundle.root(path)).expect("a file");
        (file.uid(), file.gid())
    };
    assert_eq!(owner("made"), (ROOT, ROOT));
    assert_eq!(owner("directory"), (ROOT, ROOT));
    assert_eq!(owner("link"), (ROOT, ROOT));
    assert_eq!(owner("others/made"), (ROOT + 7, ROOT + 8));
}

#[test]
fn an_overlay_in_the_guest_and_a_read_only_root_serve_it_too() {
    let sandbox = mapped("users-overlay");
    let script = "echo more >>/etc/passwd && mv /home /house && rm -r /var/tmp && mkdir /var/tmp &&
        mkdir -p /a/b && tail -n 1 /etc/passwd && ls -d /house/user && stat -c %u /a/b /etc/passwd /bin";
    sandbox.run(["sh", "-c", script]).expect_stdout("more\n/house/user\n0\n0\n0\n");
    assert!(sandbox.bundle.root("home/user").is_dir() && !sandbox.bundle.root("a").exists());
    let sandbox = sandbox.config(|config| config["root"]["readonly"] = true.into());
    sandbox.run(["sh", "-c", "touch /a || echo no"]).expect_line("no");
}

#[test]
fn a_root_that_nobody_inside_owns_is_read_as_everybody_may() {
    let sandbox = sandbox("users-strange").config(map);
    fs::write(sandbox.bundle.root("secret"), "").expect("a file");
    let nobody = fs::Permissions::from_mode(0o600);
    fs::set_permissions(sandbox.bundle.root("secret"), nobody).expect("a mode");
    let script = "stat -c %u:%g / /bin/busybox; cat /secret || echo closed; touch /a || echo held";
    let outcome = sandbox.run(["sh", "-c", script]).expect_code(0);
    assert!(outcome.out().starts_with("65534:65534\n65534:65534\n"), "{outcome}");
    outcome.expect_line("closed").expect_line("held");
}

#[test]
fn what_only_the_machine_s_root_may_set_is_set_for_it() {
    let sandbox = mapped("users-rights").config(|config| {
        let process = &mut config["process"];
        process["oomScoreAdj"] = (-500).into();
        process["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 20, "hard": 1_000_000},
            {"type": "RLIMIT_MEMLOCK", "soft": 1_073_741_824, "hard": 1_073_741_824},
        ]);
        process["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": -7});
        process["ioPriority"] = json!({"class": "IOPRIO_CLASS_RT", "priority": 3});
        process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [2000]});
        config["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "time"}));
        config["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 86400}});
        config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
        config["linux"]["devices"] = json!([{"type": "c", "path": "/dev/kmsg", "major": 1, "minor": 11}]);
    });
    let script = "
        echo oom $(cat /proc/self/oom_score_adj)
        echo files $(awk '/^Max open files/{print $4, $5}' /proc/self/limits)
        echo locked $(awk '/^Max locked/{print $4}' /proc/self/limits)
        echo nice $(awk '{print $19}' /proc/self/stat) io $(ionice -p $$)
        echo id $(id -u) $(id -G)
        echo out >/dev/stdout
        echo offset $(awk '/monotonic/{print $2}' /proc/self/timens_offsets)
        echo forward $(cat /proc/sys/net/ipv4/ip_forward)
        test -c /dev/kmsg && echo device
    ";
    let mut outcome = sandbox.run(["sh", "-c", script]).expect_code(0);
    for line in [
        "oom -500",
        "files 20 1000000",
        "locked 1073741824",
        "nice -7 io realtime: prio 3",
        "id 1000 1000 2000",
        "out",
        "offset 86400",
        "forward 1",
        "device",
    ] {
        outcome = outcome.expect_line(line);
    }
}

#[test]
fn more_processes_join_it_and_have_terminals() {
    let sandbox = mapped("users-exec").command(["sleep", "1000"]);
    let container = sandbox.start();
    let script = "echo $(id -u) $(awk '{print $2}' /proc/self/uid_map) $(readlink /proc/self/ns/user) >&2
        [ $(readlink /proc/self/ns/user) = $(readlink /proc/1/ns/user) ] && cat && stat -c %u /proc/self/fd/0";
    let outcome = sandbox.exec(&[], ["sh", "-c", script]).expect_code(0);
    assert!(outcome.err().starts_with("0 100000 user:"), "{outcome}");
    sandbox.exec(&["--user", "1000:1000"], ["id", "-u"]).expect_stdout("1000\n");
    sandbox.exec(&["--user", "70000"], ["id", "-u"]).expect_error(255, &["70000"]);
    sandbox.exec(&["--tty"], ["sh", "-c", "test -t 1 && stat -c %u $(tty)"]).expect_line("0");
    container.end();
}

#[test]
fn it_makes_cgroups_below_its_own_where_they_are_writable() {
    let sandbox = mapped("users-cgroups").writable_cgroups();
    let sandbox = sandbox.config(|config| config["linux"]["resources"]["pids"] = json!({"limit": 50}));
    let script =
        "cd /sys/fs/cgroup && mkdir inner && echo 0 >inner/cgroup.procs && echo +pids >cgroup.subtree_control
        cat /proc/self/cgroup; echo 10 >inner/pids.max && cat inner/pids.max; stat -c %u . pids.max
        echo 100 2>/dev/null >pids.max || echo held";
    sandbox.run(["sh", "-c", script]).expect_stdout("0::/inner\n10\n0\n65534\nheld\n");
    let sandbox = mapped("users-cgroups-ro");
    sandbox.run(["stat", "-c", "%u", "/sys/fs/cgroup"]).expect_stdout("65534\n");
}

#[test]
fn volumes_have_ids_of_their_own() {
    let volume = |sandbox: &Sandbox, name: &str, ids: [u32; 2]| {
        let directory = sandbox.directory().join(name);
        fs::create_dir(&directory).expect("a directory");
        for (file, id) in [("first", ids[0]), ("second", ids[1])] {
            fs::write(directory.join(file), "").expect("a file");
            chown(directory.join(file), Some(id), Some(id)).expect("an owner");
        }
        directory
    };
    let owner = |path: &Path| {
        let file = fs::metadata(path).expect("a file");
        (file.uid(), file.gid())
    };
    let sandbox = mapped("users-volumes");
    let data = volume(&sandbox, "data", [0, 5]);
    let more = volume(&sandbox, "more", [ROOT, 7]);
    let ids = json!([{"containerID": 0, "hostID": ROOT, "size": 10}]);
    let sandbox = sandbox.mount("/more", "bind", &more, &["rbind", "ridmap"]).config(|config| {
        let mount = json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind"],
            "uidMappings": ids, "gidMappings": ids});
        config["mounts"].as_array_mut().expect("a list").push(mount);
    });
    let script = "stat -c %u:%g /data /data/first /data/second /more /more/first /more/second
        mkdir /data/made && touch /data/made/file && chown 7:8 /data/made/file && stat -c %u:%g /data/made/file
        touch /more/made && echo text >>/data/second && chown 20 /data/first || echo no id";
    let seen = "0:0\n0:0\n5:5\n0:0\n65534:65534\n7:7\n7:8\nno id\n";
    sandbox.run(["sh", "-c", script]).expect_stdout(seen);
    assert_eq!(owner(&data.join("made")), (0, 0));
    assert_eq!(owner(&data.join("made/file")), (7, 8));
    assert_eq!(owner(&more.join("made")), (0, 0));
    assert_eq!(fs::read_to_string(data.join("second")).expect("a file"), "text\n");

    let mapping = json!([{"containerID": 1000, "hostID": 0, "size": 1}]);
    let sandbox = sandbox_tests::sandbox("mount-ids");
    let data = volume(&sandbox, "data", [1000, 0]);
    let mount = json!({"destination": "/data", "type": "bind", "source": data, "uidMappings": mapping,
        "gidMappings": mapping});
    let sandbox = sandbox.config(|config| config["mounts"].as_array_mut().expect("a list").push(mount));
    sandbox.run(["stat", "-c", "%u", "/data/first", "/data/second"]).expect_stdout("0\n65534\n");
}

#[test]
fn ids_of_a_file_system_without_such_mounts_are_refused_with_the_reason() {
    let sandbox = mapped("users-sysfs").mount("/a", "bind", "/sys/kernel", &["bind", "ro", "idmap"]);
    sandbox.run(["true"]).expect_error(125, &["/sys/kernel", "does not support id-mapped mounts"]);
    let sandbox = sandbox.config(|config| {
        let ids = json!([{"containerID": 0, "hostID": ROOT, "size": 1}]);
        config["mounts"] =
            json!([{"destination": "/a", "type": "tmpfs", "uidMappings": ids, "gidMappings": ids}]);
    });
    sandbox.run(["true"]).expect_error(125, &["mounts[0].uidMappings", "bind mounts"]);
}

#[test]
fn maps_that_cannot_be_are_refused_by_their_path() {
    let refused = |change: &dyn Fn(&mut Value), words: &[&str]| {
        sandbox("users-bad").config(change).run(["true"]).expect_error(125, words);
    };
    refused(
        &|c| c["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 1, "size": 1}]),
        &["linux.uidMappings", "needs a user namespace"],
    );
    let without_gids = |config: &mut Value| {
        map(config);
        config["linux"]["gidMappings"] = json!([]);
    };
    refused(&without_gids, &["linux.gidMappings", "it is missing"]);
    let of_nobody = |config: &mut Value| {
        map(config);
        config["process"]["user"]["uid"] = 65536.into();
    };
    refused(&of_nobody, &["process.user.uid", "65536 is not in linux.uidMappings"]);
    let joined = |config: &mut Value| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.push(json!({"type": "user", "path": "/proc/1/ns/user"}));
    };
    refused(&joined, &["linux.namespaces", "path"]);
}

#[test]
fn podman_maps_the_users_of_a_container() {
    let Some(podman) = Podman::new("podman-users") else { return };
    let data = podman.path("data");
    fs::create_dir(&data).expect("a directory");
    chown(&data, Some(ROOT), Some(ROOT)).expect("an owner");
    let options = format!("--uidmap 0:{ROOT}:65536 --gidmap 0:{ROOT}:65536 -v {}:/data", data.display());
    podman.start("box", &options, "id -u; stat -c %u / /bin/busybox /etc/hosts; echo a >/data/a; sleep 1000");
    podman.wait_for_log("box", "0\n0\n0\n0\n");
    podman.exec("box", "awk '{print $2}' /proc/self/uid_map; touch /new").expect_stdout("100000\n");
    while !data.join("a").exists() {
        std::thread::yield_now();
    }
    assert_eq!(fs::metadata(data.join("a")).expect("a file").uid(), ROOT);
    podman.remove("box");
}
