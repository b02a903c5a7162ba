//! What config.json asks of a container, seen from inside one.

mod host;

use std::path::Path;

use host::{Guest, process, spec};
use sandbox_protocol::{ExitStatus, FailureKind, RootWrites};
use serde_json::{Value, json};

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

/// The options of a mount inside a container, from its mountinfo.
fn options(guest: &mut Guest, spec: &Value, destination: &str) -> String {
    let info = guest.script(spec, "cat /proc/self/mountinfo");
    let line = info.lines().find(|line| line.split(' ').nth(4) == Some(destination));
    line.unwrap_or_else(|| panic!("{destination} is not in\n{info}")).to_owned()
}

#[test]
fn commands_that_cannot_be_executed_are_told_apart_at_create() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    std::fs::write(root.join("etc/plain"), "x").unwrap();
    for (args, kind, text) in [
        (&["nope"][..], FailureKind::CommandNotFound, "exec: \"nope\": executable file not found in $PATH"),
        (&["/nope"], FailureKind::CommandNotFound, "exec: \"/nope\": stat /nope: no such file or directory"),
        (&["/etc/plain"], FailureKind::CommandNotExecutable, "exec: \"/etc/plain\": permission denied"),
        (&["/etc"], FailureKind::CommandNotExecutable, "exec: \"/etc\": is a directory"),
    ] {
        let failure = guest.create("c", &spec(&root, args), RootWrites::Overlay, None).unwrap_err();
        assert_eq!(failure.kind, kind);
        assert!(failure.message.starts_with(text), "{}", failure.message);
    }
    // Nothing is left of them: the name is free.
    assert_eq!(guest.run("c", &spec(&root, &["true"])).status, ExitStatus::Code(0));
}

#[test]
fn a_file_that_the_kernel_refuses_is_told_at_start() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    std::fs::copy(root.join("bin/busybox"), root.join("bin/odd")).unwrap();
    std::fs::write(root.join("bin/odd"), "neither ELF nor script").unwrap();
    guest.create("c", &spec(&root, &["odd"]), RootWrites::Overlay, None).unwrap();
    assert_eq!(guest.start_container("c").unwrap_err().kind, FailureKind::CommandNotExecutable);
    assert_eq!(guest.start_container("c").unwrap_err().kind, FailureKind::NotFound);
}

#[test]
fn users_are_numbers_or_names() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["sh", "-c", "id -u; id -g; id -G; echo $HOME; umask; echo x > /dev/stdout"]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 5, "additionalGids": [7, 8], "umask": 23});
    assert_eq!(guest.run("c", &spec).stdout, "33\n5\n5 7 8\n/srv\n0027\nx\n");

    guest.create("c", &spec, RootWrites::Overlay, Some("web")).unwrap();
    guest.start_container("c").unwrap();
    assert_eq!(guest.finish("c", "").stdout, "33\n44\n44 4 7 8\n/srv\n0027\nx\n");
    guest.delete("c").unwrap();

    let failure = guest.create("c", &spec, RootWrites::Overlay, Some("nobody")).unwrap_err();
    assert_eq!(failure.kind, FailureKind::UnknownUser);
    assert!(failure.message.contains("unable to find user nobody"), "{}", failure.message);
}

#[test]
fn rights_are_those_configured() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &[]);
    let status = "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status | sed 's/\\t//'; ulimit -n; ulimit -Hn";
    let kill_bind_mknod_chown = 1 | 1 << 5 | 1 << 10 | 1 << 27;
    let set = format!("{kill_bind_mknod_chown:016x}");
    let empty = format!("{:016x}", 0);
    std::os::unix::fs::symlink("busybox", root.join("bin/sed")).unwrap();
    let expected = |ambient: &str, inheritable: &str| {
        format!(
            "CapInh:{inheritable}\nCapPrm:{set}\nCapEff:{set}\nCapBnd:{set}\nCapAmb:{ambient}\nNoNewPrivs:1\nSeccomp:0\n256\n512\n"
        )
    };
    assert_eq!(guest.script(&spec, status), expected(&empty, &empty));
    // A user that is not root keeps them by the ambient set only.
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    for of in ["inheritable", "ambient"] {
        spec["process"]["capabilities"][of] = spec["process"]["capabilities"]["permitted"].clone();
    }
    assert_eq!(guest.script(&spec, status), expected(&set, &set));
}

#[test]
fn writes_go_where_they_are_asked_to() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let write = spec(
        &root,
        &["sh", "-c", "echo new > /etc/new && rm -r /tmp && mkdir /work && mv /etc /moved && cat /moved/new"],
    );
    std::os::unix::fs::symlink("busybox", root.join("bin/rm")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/mv")).unwrap();
    let ended = guest.run("c", &write);
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("new\n", ""));
    assert!(!root.join("etc/new").exists() && root.join("tmp").exists() && !root.join("work").exists());

    guest.create("c", &write, RootWrites::Through, None).unwrap();
    guest.start_container("c").unwrap();
    assert_eq!(guest.finish("c", "").stdout, "new\n");
    assert!(root.join("moved/new").exists());
}

#[test]
fn a_read_only_root_is_one_and_its_mounts_are_not() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["sh", "-c", "touch /x; touch /dev/shm/y && echo fine"]);
    spec["root"]["readonly"] = json!(true);
    let ended = guest.run("c", &spec);
    assert_eq!(ended.stdout, "fine\n");
    assert!(ended.stderr.contains("Read-only file system"), "{}", ended.stderr);
}

#[test]
fn mounts_have_their_options() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let source = guest.rootfs("source");
    let mut spec = spec(&root, &[]);
    add_mount(
        &mut spec,
        json!({"destination": "/new/t", "type": "tmpfs", "source": "mine",
        "options": ["noexec", "nodev", "noatime", "ro", "size=64k", "mode=700", "uid=5"]}),
    );
    add_mount(
        &mut spec,
        json!({"destination": "/b", "source": source,
        "options": ["rbind", "rprivate", "ro", "nosuid"]}),
    );
    add_mount(
        &mut spec,
        json!({"destination": "/etc/file", "type": "bind", "source": source.join("etc/passwd"),
        "options": ["bind"]}),
    );
    add_mount(
        &mut spec,
        json!({"destination": "/tmp", "type": "tmpfs", "source": "t", "options": ["shared"]}),
    );

    let tmpfs = options(&mut guest, &spec, "/new/t");
    assert!(tmpfs.contains(" ro,nodev,noexec,noatime "), "{tmpfs}");
    assert!(tmpfs.contains("tmpfs mine rw,size=64k,mode=700,uid=5"), "{tmpfs}");
    let bind = options(&mut guest, &spec, "/b");
    assert!(bind.contains(" ro,nosuid,relatime - "), "{bind}");
    assert!(options(&mut guest, &spec, "/tmp").contains(" shared:"));
    assert_eq!(guest.script(&spec, "head -n 1 /etc/file"), "root:x:0:0:root:/root:/bin/sh\n");
    assert_eq!(guest.script(&spec, "stat -c %a /tmp"), "755\n");
    assert!(!root.join("b").exists(), "mount points are made in the overlay");

    add_mount(
        &mut spec,
        json!({"destination": "/bad", "type": "tmpfs", "source": "t", "options": ["mode=x"]}),
    );
    let failure = guest.create("c", &spec, RootWrites::Overlay, None).unwrap_err();
    assert!(
        failure.message.starts_with(
            "cannot mount tmpfs at /bad (mounts[11] of config.json): tmpfs refuses the option \"mode=x\""
        ),
        "{}",
        failure.message
    );
}

#[test]
fn links_in_the_root_lead_no_mount_out_of_it() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let outside = guest.rootfs("outside");
    std::os::unix::fs::symlink(&outside, root.join("absolute")).unwrap();
    std::os::unix::fs::symlink("../../../../../../..", root.join("up")).unwrap();
    let mut spec = spec(&root, &["true"]);
    for destination in ["/absolute/a", "/up/etc/b"] {
        add_mount(&mut spec, json!({"destination": destination, "type": "tmpfs", "source": "t"}));
    }
    guest.create("c", &spec, RootWrites::Through, None).unwrap();
    guest.start_container("c").unwrap();
    guest.finish("c", "");
    assert!(!outside.join("a").exists() && !Path::new("/etc/b").exists());
    assert!(root.join("etc/b").exists());
    assert!(root.join(outside.strip_prefix("/").unwrap()).join("a").exists());
}

#[test]
fn dev_is_as_programs_expect_it() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &[]);
    spec["linux"]["devices"] = json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200,
        "fileMode": 384, "uid": 3, "gid": 4}]);
    let script =
        "for d in null zero full random urandom tty net/tun; do stat -c '%n %t:%T %a %u' /dev/$d; done;
        for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; head -c 4 /dev/zero | wc -c";
    assert_eq!(
        guest.script(&spec, script),
        "/dev/null 1:3 666 0\n/dev/zero 1:5 666 0\n/dev/full 1:7 666 0\n/dev/random 1:8 666 0\n\
         /dev/urandom 1:9 666 0\n/dev/tty 5:0 666 0\n/dev/net/tun a:c8 600 3\n\
         /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n4\n"
    );
}

#[test]
fn devices_that_are_not_allowed_can_be_made_but_not_used() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    // A number that no driver has: what is allowed fails too, but in another way.
    let mut spec = spec(&root, &["sh", "-c", "mknod /dev/m c 240 77 && head -c 1 /dev/m"]);
    let ended = guest.run("c", &spec);
    assert!(ended.stderr.contains("Operation not permitted"), "{}", ended.stderr);
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 240, "minor": 77, "access": "r"}]);
    let ended = guest.run("c", &spec);
    assert!(ended.stderr.contains("No such device or address"), "{}", ended.stderr);
}

#[test]
fn masked_paths_are_empty_and_read_only_ones_read_only() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    std::fs::write(root.join("etc/secret"), "secret").unwrap();
    std::fs::create_dir_all(root.join("keys/deep")).unwrap();
    let mut spec = spec(&root, &[]);
    spec["linux"]["maskedPaths"] = json!(["/etc/secret", "/keys", "/nowhere"]);
    spec["linux"]["readonlyPaths"] = json!(["/tmp", "/proc/sys"]);
    let script = "cat /etc/secret; ls /keys; touch /tmp/x 2>&1; touch /keys/x 2>&1; true";
    let seen = guest.script(&spec, script);
    assert_eq!(seen.matches("Read-only file system").count(), 2, "{seen}");
    assert_eq!(seen.lines().count(), 2, "{seen}");
}

#[test]
fn names_and_kernel_settings_are_the_containers_own() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &[]);
    spec["domainname"] = json!("example.org");
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_default_ttl": "77", "kernel/msgmax": "4096"});
    let script =
        "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/msgmax
        cat /sys/class/net/lo/flags; grep -c : /proc/net/dev; echo $$";
    assert_eq!(guest.script(&spec, script), "box\nexample.org\n77\n4096\n0x9\n1\n1\n");
    spec["linux"]["sysctl"] = json!({"net.no.such": "1"});
    let failure = guest.create("c", &spec, RootWrites::Overlay, None).unwrap_err();
    assert!(failure.message.contains("linux.sysctl: cannot set net.no.such to \"1\""), "{}", failure.message);
}

#[test]
fn forbidden_system_calls_fail_as_configured() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["sh", "-c", "mkdir /x 2>&1; echo $?"]);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122}]
    });
    for no_new_privileges in [true, false] {
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let ended = guest.run("c", &spec);
        assert!(ended.stdout.contains("quota exceeded"), "{ended:?}");
    }
    guest
        .create(
            "c",
            &{
                let mut s = spec.clone();
                s["process"]["args"] = json!(["sleep", "1000"]);
                s
            },
            RootWrites::Overlay,
            None,
        )
        .unwrap();
    guest.start_container("c").unwrap();
    guest.exec("c", "p", process(&["sh", "-c", "mkdir /x 2>&1"])).unwrap();
    assert!(guest.finish("c", "p").stdout.contains("quota exceeded"));
}

#[test]
fn the_working_directory_is_made_where_it_is_missing() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["pwd"]);
    spec["process"]["cwd"] = json!("/srv/deep");
    assert_eq!(guest.run("c", &spec).stdout, "/srv/deep\n");
}

#[test]
fn what_cannot_be_had_is_refused_before_anything_is_made() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &["true"]);
    spec["linux"]["namespaces"] = json!([{"type": "pid"}]);
    let failure = guest.create("c", &spec, RootWrites::Overlay, None).unwrap_err();
    assert!(failure.message.contains("no mount namespace"), "{}", failure.message);
    let failure = guest.create("../c", &spec, RootWrites::Overlay, None).unwrap_err();
    assert!(failure.message.contains("is not an id"), "{}", failure.message);
}

#[test]
fn a_cgroup_mount_shows_the_containers_own_only() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &[]);
    let script = "cat /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/x 2>&1; ls -d /sys/fs/cgroup/script 2>&1; true";
    for namespace in ["with", "without"] {
        let seen = guest.script(&spec, script);
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines[0], "1", "{namespace} a cgroup namespace: {seen}");
        assert!(seen.contains("Read-only file system") && seen.contains("No such file"), "{seen}");
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "cgroup");
    }
}

#[test]
fn a_namespace_that_is_left_out_is_the_sandboxs_own() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &[]);
    for kind in ["uts", "ipc", "network", "pid"] {
        let script = format!("readlink /proc/self/ns/{}", if kind == "network" { "net" } else { kind });
        let own = guest.script(&spec, &script);
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != kind);
        let first = guest.script(&spec, &script);
        let second = guest.script(&spec, &script);
        assert_ne!(own, first, "{kind}");
        assert_eq!(first, second, "{kind}");
    }
}

#[test]
fn a_mount_can_be_changed_and_the_roots_propagation_set() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    let mut spec = spec(&root, &[]);
    add_mount(&mut spec, json!({"destination": "/dev/shm", "options": ["remount", "bind", "ro", "noatime"]}));
    spec["linux"]["rootfsPropagation"] = json!("rshared");
    let shm = options(&mut guest, &spec, "/dev/shm");
    assert!(shm.contains(" ro,nosuid,nodev,noexec,noatime "), "{shm}");
    assert!(options(&mut guest, &spec, "/").contains(" shared:"));
    spec["linux"]["rootfsPropagation"] = json!("sideways");
    let failure = guest.create("c", &spec, RootWrites::Overlay, None).unwrap_err();
    assert!(failure.message.contains("linux.rootfsPropagation is \"sideways\""), "{}", failure.message);
}

#[test]
fn one_more_process_has_rights_of_its_own() {
    let Some(mut guest) = Guest::start() else { return };
    let root = guest.rootfs("root");
    guest.create("c", &spec(&root, &["sleep", "1000"]), RootWrites::Overlay, None).unwrap();
    guest.start_container("c").unwrap();
    let mut process =
        process(&["sh", "-c", "id -u; pwd; grep CapEff /proc/self/status; echo $HOME; ulimit -n"]);
    process["user"] = json!({"uid": 33, "gid": 44});
    process["cwd"] = json!("/etc");
    process["capabilities"] = json!({});
    process["rlimits"] = json!([]);
    guest.exec("c", "p", process).unwrap();
    let ended = guest.finish("c", "p");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines[..4], ["33", "/etc", "CapEff:\t0000000000000000", "/srv"], "{ended:?}");
    assert_ne!(lines[4], "256", "the limits of the first process are its own");
}
