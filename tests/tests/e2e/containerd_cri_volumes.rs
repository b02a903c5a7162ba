//! Volumes of pods, as a kubelet prepares them on the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::mount::{MsFlags, mount, umount};
use sandbox_tests::kubelet::Pod;
use sandbox_tests::{Disk, Kubelet};
use serde_json::{Value, json};

/// Makes a directory with a file in it.
fn directory(path: &Path, content: &str) {
    fs::create_dir_all(path).expect("a directory");
    fs::write(path.join("file"), content).expect("a file");
}

fn volume(host: &Path, container: &str) -> Value {
    json!({"host": host, "container": container})
}

/// A volume in memory as a kubelet makes one, with the group of `fsGroup`; and a part of it, for a container that mounts a
/// `subPath`. Both are memory of the guest.
fn memory_is_the_guest_s_and_the_pod_s(kubelet: &Kubelet, pod: &Pod) {
    let directory = kubelet.containerd.path("pods/1");
    let cache = directory.join("volumes/kubernetes.io~empty-dir/cache");
    let part = directory.join("volume-subpaths/cache/two/0");
    for directory in [&cache, &part] {
        fs::create_dir_all(directory).expect("a directory");
    }
    mount(Some("tmpfs"), &cache, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).expect("root");
    chown(&cache, None, Some(3000)).expect("root");
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o2777)).expect("root");
    fs::create_dir(cache.join("part")).expect("a directory");
    fs::set_permissions(cache.join("part"), fs::Permissions::from_mode(0o2770)).expect("root");
    mount(Some(&cache.join("part")), &part, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("root");

    let sleep = "exec sleep 1000";
    let mut whole = json!({"mounts": [volume(&cache, "/cache")], "user": 2000});
    let a = kubelet.start(pod, "a", sleep, whole.clone());
    let mounts = json!([volume(&part, "/part"), volume(&cache, "/cache")]);
    let b = kubelet.start(pod, "b", sleep, json!({"mounts": mounts, "user": 2001, "groups": [3000]}));
    let made = "stat -c '%a %u %g' /cache; df -k /cache | grep -c ' 1024 '";
    kubelet.exec(&a, made).expect_stdout("2777 0 3000\n1\n");
    kubelet.exec(&a, "echo kept >/cache/file; head -c 614400 /dev/zero >/cache/zeroes").expect_code(0);
    kubelet.exec(&b, "cat /cache/file; stat -c '%u %g' /cache/file").expect_stdout("kept\n2000 3000\n");
    kubelet.exec(&b, "stat -c '%a %u %g' /part; echo in part >/part/file").expect_stdout("2770 0 3000\n");
    kubelet.exec(&b, "cat /cache/part/file").expect_stdout("in part\n");
    kubelet.exec(&a, "ls /cache/part").expect_error(1, &["Permission denied"]);
    // It is memory of the container that wrote it, and there is no more of it than the volume has.
    let shared = "sed -n 's/^shmem //p' /sys/fs/cgroup/memory.stat";
    kubelet.exec(&a, &format!("until [ $({shared}) -ge 614400 ]; do sleep 0.2; done")).expect_code(0);
    kubelet.exec(&a, "dd if=/dev/zero of=/cache/more bs=1k count=600").expect_error(1, &["No space left"]);

    // It outlives its containers. Nothing of it is on the host, and nothing holds what is mounted there.
    kubelet.remove(&a);
    kubelet.remove(&b);
    whole["attempt"] = 1.into();
    let again = kubelet.start(pod, "a", sleep, whole);
    kubelet.exec(&again, "cat /cache/file").expect_stdout("kept\n");
    let names = |directory: &Path| -> Vec<_> {
        fs::read_dir(directory).expect("a directory").flatten().map(|entry| entry.file_name()).collect()
    };
    assert_eq!((names(&cache), names(&part)), (vec!["part".into()], vec![]));
    for directory in [&part, &cache] {
        umount(directory).expect("nothing holds it");
    }
}

#[test]
fn directories_files_and_groups_are_as_kubernetes_says() {
    let Some(kubelet) = Kubelet::new("cri-volumes") else { return };
    let top = kubelet.containerd.path("volumes");
    directory(&top.join("data/sub"), "of the sub path\n");
    directory(&top.join("fixed"), "read only\n");
    directory(&top.join("group"), "");
    chown(top.join("group"), None, Some(3000)).expect("root");
    fs::set_permissions(top.join("group"), fs::Permissions::from_mode(0o2770)).expect("root");
    let mut fixed = volume(&top.join("fixed"), "/fixed");
    fixed["read_only"] = true.into();
    let mounts = json!([
        volume(&top.join("data/sub"), "/data"),
        volume(&top.join("data/sub/file"), "/etc/one"),
        fixed,
        volume(&top.join("group"), "/group"),
    ]);
    let pod = kubelet.pod("pod");
    let script = "cat /data/file /etc/one /fixed/file; ls /data; echo >/fixed/new || echo refused; echo mine >/group/new";
    let besides = json!({"mounts": mounts, "user": 2000, "groups": [3000]});
    let (_, log) = kubelet.run(&pod, "one", script, besides);
    // The line of standard error among them comes when it comes.
    let (errors, lines): (Vec<_>, Vec<_>) = log.lines().partition(|line| line.contains("Read-only"));
    assert_eq!(
        (errors.len(), lines.join(" ")),
        (1, "of the sub path of the sub path read only file refused".into())
    );
    assert!(!top.join("fixed/new").exists());
    let made = fs::metadata(top.join("group/new")).expect("it was written");
    assert_eq!((made.uid(), made.gid()), (2000, 3000));
    memory_is_the_guest_s_and_the_pod_s(&kubelet, &pod);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn what_changes_on_the_host_is_seen_and_what_was_used_is_let_go() {
    let Some(kubelet) = Kubelet::new("cri-projected") else { return };
    // A projected volume: its names lead through a symbolic link, which is replaced at once.
    let top = kubelet.containerd.path("projected");
    directory(&top.join("..first"), "first\n");
    symlink("..first", top.join("..data")).expect("a link");
    symlink("..data/file", top.join("file")).expect("a link");
    // A file system that is mounted on the host, and will have to be let go.
    let memory = kubelet.containerd.path("memory");
    fs::create_dir(&memory).expect("a directory");
    mount(Some("tmpfs"), &memory, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).expect("root");

    let pod = kubelet.pod("pod");
    let mounts = json!([volume(&top, "/projected"), volume(&memory, "/memory")]);
    let wait = "until grep -q second /projected/file; do cat /projected/file; sleep 0.2; done; echo seen";
    let script = format!("echo kept >/memory/file; {wait}");
    let one = kubelet.start(&pod, "one", &script, json!({"mounts": mounts}));
    kubelet.exec(&one, "cat /projected/file").expect_stdout("first\n");

    directory(&top.join("..second"), "second\n");
    symlink("..second", top.join("..new")).expect("a link");
    fs::rename(top.join("..new"), top.join("..data")).expect("a link");
    fs::remove_dir_all(top.join("..first")).expect("a directory");
    let status =
        kubelet.wait_for(&["status", &one], |status| status["state"] == sandbox_tests::kubelet::EXITED);
    assert_eq!(status["exit_code"], 0, "{status} {}", kubelet.log("one", 0));
    kubelet.remove(&one);

    // Another container has the volume, and when it is gone, nothing holds it: it can be unmounted under the pod.
    let again = json!({"mounts": [volume(&memory, "/memory")], "attempt": 1});
    let two = kubelet.start(&pod, "one", "cat /memory/file; exec sleep 1000", again);
    kubelet.exec(&two, "cat /memory/file").expect_stdout("kept\n");
    kubelet.remove(&two);
    umount(&memory).expect("nothing holds it");
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn a_raw_block_volume_is_the_host_s_and_is_let_go() {
    let Some(kubelet) = Kubelet::new("cri-block") else { return };
    let disk = |name: &str| Disk::new("cri-block", &kubelet.containerd.path(name), 4 << 20);
    let (Some(data), Some(fixed)) = (disk("data"), disk("fixed")) else { return };
    data.write(0, "from the host");
    fixed.write(0, "read only");
    let devices = json!([
        {"host": data.path(), "container": "/dev/xvda", "permissions": "mrw"},
        {"host": fixed.path(), "container": "/dev/xvdb", "permissions": "mr"},
    ]);
    let pod = kubelet.pod("pod");
    let stays = kubelet.start(&pod, "stays", "exec sleep 1000", json!({}));
    let script = "head -c 13 /dev/xvda; echo; head -c 9 /dev/xvdb; echo; wc -c </dev/xvda; \
        echo x >/dev/xvdb || echo refused; echo from the guest | dd of=/dev/xvda bs=512 seek=9 conv=notrunc";
    let (_, log) = kubelet.run(&pod, "one", script, json!({"devices": devices}));
    // Among them are lines of standard error, which come when they come.
    for line in ["from the host", "read only", "4194304", "refused"] {
        assert!(log.lines().any(|logged| logged == line), "{line:?}: {log}");
    }
    assert_eq!(data.read(9 * 512, 14), "from the guest");
    assert_eq!(fixed.read(0, 9), "read only");
    // The other containers of the pod see nothing of it.
    kubelet.exec(&stays, "ls /dev/xvda").expect_code(1);

    // The container is made once more, with the other device no more: that one is free, as the pod lives on.
    let besides = json!({"devices": [devices[0]], "attempt": 1});
    let again = kubelet.start(&pod, "one", "exec sleep 1000", besides);
    let read = "dd if=/dev/xvda bs=512 skip=9 count=1 2>/dev/null | head -c 14";
    kubelet.exec(&again, read).expect_stdout("from the guest");
    // What it has read is in its metrics.
    let metrics = kubelet.containerd.line(&format!("task metrics --format json {again}")).expect_code(0);
    let metrics: Value = serde_json::from_slice(&metrics.stdout).expect("it is JSON");
    let devices = metrics["io"]["usage"].as_array().map(Vec::as_slice).unwrap_or_default();
    assert!(devices.iter().any(|device| device["rbytes"].as_u64().unwrap_or(0) >= 512), "{metrics}");
    drop(fixed);
    kubelet.exec(&stays, "cat /sys/block/loop*/loop/backing_file | wc -l").expect_stdout("1\n");
    kubelet.remove(&again);
    kubelet.exec(&stays, "cat /sys/block/loop*/loop/backing_file 2>/dev/null | wc -l").expect_stdout("0\n");
    drop(data);

    // What is no block device is the guest's, or refused.
    let gone = json!({"devices": [{"host": "/dev/no-such", "container": "/dev/xvda", "permissions": "rw"}]});
    kubelet.create(&pod, "odd", "true", gone).expect_error(1, &["/dev/no-such"]);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
}
