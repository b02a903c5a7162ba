//! Volumes of pods, as a kubelet prepares them on the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::mount::{MsFlags, mount, umount};
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
    for line in ["of the sub path\nof the sub path\nread only\nfile\n", "refused\n", "Read-only"] {
        assert!(log.contains(line), "{line:?}: {log}");
    }
    assert!(!top.join("fixed/new").exists());
    let made = fs::metadata(top.join("group/new")).expect("it was written");
    assert_eq!((made.uid(), made.gid()), (2000, 3000));
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
    // An emptyDir in memory.
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
