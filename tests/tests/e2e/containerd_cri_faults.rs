//! A node that lacks something: an error says so, and the pod's name is free.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sandbox_tests::{Kubelet, initramfs};
use serde_json::json;

const SERVICE: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

/// Asks for a pod, which has to be refused with these words and to leave nothing.
#[track_caller]
fn refused(kubelet: &Kubelet, words: &[&str]) {
    let config = kubelet.pod_config("pod", json!({})).to_string();
    kubelet.ask(["run-pod", &config]).expect_error(1, words);
    kubelet.containerd.expect_no_sandbox();
}

#[test]
fn what_a_node_lacks_is_said_and_the_name_of_the_pod_is_free() {
    let Some(kubelet) = Kubelet::new("cri-lacks") else { return };
    let containerd = &kubelet.containerd;
    let missing = Path::new("/no/such/file");
    containerd.with_artefact("vmlinux", missing, || refused(&kubelet, &["the guest kernel", "vmlinux"]));
    containerd.with_artefact("guest.img", missing, || refused(&kubelet, &["guest.img"]));
    let garbage = containerd.path("garbage");
    fs::write(&garbage, [7; 100_000]).expect("a file");
    containerd.with_artefact("vmlinux", &garbage, || refused(&kubelet, &["vmlinux", "kernel"]));

    // The agent dies at its first step, or never gets there.
    let image = containerd.path("image-that-panics");
    initramfs::write(&image, Some("panic")).expect("an image");
    containerd
        .with_artefact("guest.img", &image, || refused(&kubelet, &["panic", "these are the last words"]));
    initramfs::write(&image, Some("sleep")).expect("an image");
    containerd.operator("machine.boot_timeout = \"3s\"\n");
    containerd.with_artefact("guest.img", &image, || refused(&kubelet, &["agent"]));
    containerd.operator("");

    // The disk of the state is full.
    let state = containerd.path("state");
    mount(Some("tmpfs"), &state, Some("tmpfs"), MsFlags::empty(), Some("size=16k,mode=700")).expect("root");
    while fs::write(state.join("filler"), [1; 16 << 10]).is_ok() {
        fs::rename(state.join("filler"), state.join("more")).expect("it is there");
    }
    let config = kubelet.pod_config("pod", json!({})).to_string();
    let full = kubelet.ask(["run-pod", &config]);
    umount2(&state, MntFlags::MNT_DETACH).expect("root");
    full.expect_error(1, &["No space left"]);
    containerd.expect_no_sandbox();

    let pod = kubelet.pod("pod");
    let one = kubelet.start(&pod, "one", SERVICE, json!({}));
    kubelet.exec(&one, "echo sound").expect_stdout("sound\n");
    // A volume is gone before a container that mounts it is started: the name of the container is free.
    let volume = containerd.path("volume");
    let text = volume.display().to_string();
    let gone = json!({"mounts": [{"host": &volume, "container": "/data"}]});
    fs::create_dir(&volume).expect("a directory");
    let id = kubelet.create(&pod, "gone", SERVICE, gone.clone()).expect_code(0).out();
    fs::remove_dir(&volume).expect("a directory");
    kubelet.ask(["start", id.trim()]).expect_error(1, &["mounts[", ".source", &text, "No such file"]);
    kubelet.ask(["remove", id.trim()]).expect_code(0);
    fs::create_dir(&volume).expect("a directory");
    let back = kubelet.start(&pod, "gone", SERVICE, gone);
    kubelet.exec(&back, "ls /data").expect_stdout("");
    // The namespace vanishes under it. The machine has its interfaces by then.
    let namespaces =
        fs::read_dir(containerd.path("run/io.containerd.grpc.v1.cri/netns")).expect("a directory");
    for namespace in namespaces.flatten() {
        umount2(&namespace.path(), MntFlags::MNT_DETACH).expect("it is mounted");
        fs::remove_file(namespace.path()).expect("it is there");
    }
    let two = kubelet.start(&pod, "two", SERVICE, json!({}));
    kubelet.exec(&two, "ls /sys/class/net | grep -c eth0").expect_stdout("1\n");
    kubelet.end(&pod);
    containerd.expect_no_sandbox();
}
