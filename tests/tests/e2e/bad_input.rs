//! Bad input: a clear error of its own for each, nothing left behind, and the same id works again.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sandbox_tests::place::{artefact, on_kvm, skip};
use sandbox_tests::process::Process;
use sandbox_tests::sandbox::NO_ARGS;
use sandbox_tests::{Sandbox, initramfs, sandbox};
use serde_json::json;

/// The exit code of the runtime's own errors.
const ERROR: i32 = 125;

#[test]
fn a_bundle_that_is_missing_or_no_bundle() {
    let sandbox = sandbox("bundle");
    let at = |name: &str| sandbox.directory().join(name);
    sandbox.run_bundle(&at("missing")).expect_error(ERROR, &["missing", "No such file"]);
    fs::write(at("file"), "").unwrap();
    sandbox.run_bundle(&at("file")).expect_error(ERROR, &["file", "not a directory"]);
    fs::create_dir(at("empty")).unwrap();
    sandbox.run_bundle(&at("empty")).expect_error(ERROR, &["config.json", "sandbox spec"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_config_that_is_not_json_or_of_another_version() {
    let sandbox = sandbox("json");
    fs::write(sandbox.bundle.config_path(), "{\"ociVersion\": \"1.0.2\",").unwrap();
    sandbox.run(NO_ARGS).expect_error(ERROR, &["config.json", "line 1"]);
    sandbox.bundle.write(&json!({"ociVersion": "2.0.0"}));
    sandbox.run(NO_ARGS).expect_error(ERROR, &["ociVersion", "2.0.0"]);
    sandbox.bundle.write(&json!({}));
    sandbox.run(NO_ARGS).expect_error(ERROR, &["ociVersion"]);
    sandbox.bundle.write(&json!([1]));
    sandbox.run(NO_ARGS).expect_error(ERROR, &["config.json"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn fields_that_are_unknown_or_not_supported_are_named_by_their_path() {
    let sandbox = sandbox("fields");
    let good = sandbox.bundle.config();
    let rows = [
        ("/process/frobnicate", json!(1), "process.frobnicate"),
        ("/frobnicate", json!({}), "frobnicate"),
        ("/process/commandLine", json!("x"), "process.commandLine"),
        ("/process/scheduler", json!({"policy": "SCHED_FIFO"}), "process.scheduler.priority"),
        ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 1000, "size": 1}]), "linux.uidMappings"),
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}),
            "linux.seccomp.syscalls[0].action",
        ),
        ("/linux/cgroupsPath", json!("/../x"), "linux.cgroupsPath"),
        ("/linux/resources/blockIO", json!({"weight": 9}), "linux.resources.blockIO.weight"),
        (
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "/2MB", "limit": 1}]),
            "linux.resources.hugepageLimits[0].pageSize",
        ),
        ("/linux/namespaces", json!([{"type": "ipc", "path": "/proc/1/ns/ipc"}]), "linux.namespaces[0].path"),
        ("/mounts", json!([{"destination": "/x", "type": "nfs", "source": "x"}]), "mounts[0].type"),
        ("/mounts", json!([{"destination": "/x", "type": "tmpfs", "options": ["frob"]}]), "mounts[0]"),
        ("/windows", json!({"layerFolders": ["x"]}), "windows"),
    ];
    for (pointer, value, path) in rows {
        let mut config = good.clone();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[name] = value;
        sandbox.bundle.write(&config);
        sandbox.run(NO_ARGS).expect_error(ERROR, &[path]);
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_capability_that_nobody_knows_is_left_out_and_told() {
    let sandbox = sandbox("unknown-capability");
    let sandbox =
        sandbox.config(|config| config["process"]["capabilities"]["bounding"] = json!(["CAP_FROB"]));
    let outcome = sandbox.run(["grep", "CapBnd", "/proc/self/status"]).expect_code(0);
    assert_eq!(outcome.out().split_whitespace().last(), Some("0000000000000000"), "{outcome}");
    assert!(outcome.err().contains("bounding: \"CAP_FROB\" is no capability"), "{outcome}");
}

#[test]
fn values_that_make_no_sense_are_named_by_their_path() {
    let sandbox = sandbox("values");
    let good = sandbox.bundle.config();
    let socket = sandbox.directory().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let rows = [
        ("/process/args", json!([]), "process.args"),
        ("/process/args", json!("sh"), "process.args"),
        ("/process/cwd", json!("relative"), "process.cwd"),
        ("/process/user", json!({"uid": -1, "gid": 0}), "process.user.uid"),
        ("/process/capabilities", json!({"bounding": [7]}), "process.capabilities.bounding"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_FROB", "soft": 1, "hard": 1}]),
            "process.rlimits[0].type",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}]),
            "/no/such",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": socket, "options": ["bind"]}]),
            "neither a directory nor a regular file: sockets",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/dev/zero", "options": ["bind"]}]),
            "/dev/zero",
        ),
        ("/linux/resources/memory", json!({"limit": 4096}), "linux.resources.memory.limit"),
    ];
    for (pointer, value, path) in rows {
        let mut config = good.clone();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[name] = value;
        sandbox.bundle.write(&config);
        sandbox.run(NO_ARGS).expect_error(ERROR, &[path]);
    }
    drop(listener);
    fs::remove_file(&socket).unwrap();
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_root_file_system_whose_proc_is_a_link() {
    let sandbox = sandbox("proc-link");
    let proc = sandbox.bundle.root("proc");
    fs::remove_dir(&proc).unwrap();
    std::os::unix::fs::symlink("tmp", &proc).unwrap();
    sandbox.run(NO_ARGS).expect_error(ERROR, &["/proc", "proc must be mounted on an ordinary directory"]);
    fs::remove_file(&proc).unwrap();
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_root_file_system_that_is_missing_or_no_directory() {
    let sandbox = sandbox("rootfs");
    fs::rename(sandbox.bundle.root(""), sandbox.directory().join("moved")).unwrap();
    sandbox.run(["true"]).expect_error(ERROR, &["root.path", "rootfs"]);
    fs::write(sandbox.bundle.path().join("rootfs"), "").unwrap();
    sandbox.run(["true"]).expect_error(ERROR, &["root.path", "not a directory"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_empty_root_file_system_is_a_root_without_commands() {
    let sandbox = sandbox("empty-root");
    fs::rename(sandbox.bundle.root(""), sandbox.directory().join("moved")).unwrap();
    fs::create_dir(sandbox.bundle.root("")).unwrap();
    sandbox.run(["/bin/true"]).expect_error(127, &["/bin/true"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_command_that_is_not_found_is_127_and_one_that_cannot_run_is_126() {
    let sandbox = sandbox("command");
    fs::write(sandbox.bundle.root("bin/data"), "no program").unwrap();
    sandbox.run(["frobnicate"]).expect_error(127, &["frobnicate", "not found"]);
    sandbox.run(["/no/such/place"]).expect_error(127, &["/no/such/place"]);
    sandbox.run(["/bin/data"]).expect_error(126, &["/bin/data"]);
    sandbox.run(["/etc"]).expect_error(126, &["/etc"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_user_that_does_not_exist() {
    let sandbox = sandbox("user").option("--user", "frobnicator");
    sandbox.run(["true"]).expect_error(ERROR, &["frobnicator"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn options_that_make_no_sense() {
    for (option, value) in [("--memory", "much"), ("--cpus", "0"), ("--timeout", "soon"), ("--frob", "x")] {
        sandbox("options").option(option, value).run(["true"]).expect_error(ERROR, &[option]);
    }
    let sandbox = sandbox("tiny").option("--memory", "1M");
    sandbox.run(["true"]).expect_error(ERROR, &["memory", "1"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_id_that_is_no_id() {
    let sandbox = sandbox("id");
    for id in ["../x", "a/b", "", ".."] {
        let words = ["run", "--id", id].map(str::to_owned).into_iter().chain([sandbox
            .bundle
            .path()
            .to_str()
            .unwrap()
            .to_owned()]);
        sandbox.verb(words).expect_error(ERROR, &["id"]);
    }
}

#[test]
fn a_kernel_or_image_that_is_missing_or_something_else() {
    let garbage = tempfile::NamedTempFile::new().unwrap();
    fs::write(&garbage, [7; 100_000]).unwrap();
    for variable in ["SANDBOX_KERNEL", "SANDBOX_IMAGE"] {
        let missing = sandbox("no-artefact").host_env(variable, "/no/such/file");
        missing.run(["true"]).expect_error(ERROR, &["/no/such/file", variable]);
        missing.expect_clean_and_usable();
        let wrong = sandbox("bad-artefact").host_env(variable, garbage.path());
        wrong.run(["true"]).expect_error(ERROR, &[garbage.path().to_str().unwrap()]);
        wrong.expect_clean_and_usable();
    }
}

#[test]
fn a_kernel_that_is_cut_short() {
    let kernel = fs::read(artefact("SANDBOX_KERNEL", "vmlinux")).unwrap();
    let cut = tempfile::NamedTempFile::new().unwrap();
    fs::write(&cut, &kernel[..kernel.len() / 3]).unwrap();
    let sandbox = sandbox("cut-kernel").host_env("SANDBOX_KERNEL", cut.path());
    let outcome = sandbox.run(["true"]).expect_code(ERROR);
    assert!(outcome.err().contains("kernel"), "{outcome}");
    sandbox.expect_clean_and_usable();
}

#[test]
fn dev_kvm_missing_or_not_permitted() {
    let sandbox = sandbox("dev-kvm").machine("kvm");
    let missing = "mkdir $0/dev && mount -t tmpfs dev $0/dev && for n in null zero urandom tty; do \
                   touch $0/dev/$n && mount --bind /dev/$n $0/dev/$n; done; mkdir $0/dev/shm $0/dev/pts; \
                   mount --bind $0/dev /dev";
    with_mounts(&sandbox, missing).expect_error(ERROR, &["there is no /dev/kvm", "--machine qemu"]);
    let denied = "mkdir $0/nodev && mount -t tmpfs -o nodev nodev $0/nodev && mknod $0/nodev/kvm c 10 232 && \
                  touch /dev/kvm 2>/dev/null; mount --bind $0/nodev/kvm /dev/kvm";
    with_mounts(&sandbox, denied).expect_error(ERROR, &["no permission to open /dev/kvm"]);
    for name in ["dev", "nodev"] {
        let _ = fs::remove_dir(sandbox.directory().join(name));
    }
    sandbox.expect_clean_and_usable();
}

/// Runs `true` in a mount namespace that `script` has changed; `$0` is a directory of the test.
fn with_mounts(sandbox: &Sandbox, script: &str) -> sandbox_tests::Outcome {
    let run = sandbox.run_command(sandbox.bundle.path(), ["true"]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{script}; exec \"$@\"")]).arg(sandbox.directory());
    command.arg(run.get_program()).args(run.get_args());
    for (name, value) in run.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    Process::spawn(&mut command).wait()
}

#[test]
fn qemu_not_installed() {
    let sandbox = sandbox("no-qemu").machine("qemu").host_env("PATH", "/no/such/directory");
    sandbox.run(["true"]).expect_error(ERROR, &["qemu-system-x86", "apt"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_guest_that_panics_shows_its_last_console_lines() {
    let (image, _directory) = image_that("panic");
    let sandbox = sandbox("panic").host_env("SANDBOX_IMAGE", image);
    sandbox
        .run(["true"])
        .expect_error(ERROR, &["panic", "Attempted to kill init", "these are the last words"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_agent_that_powers_off_without_a_word() {
    let (image, _directory) = image_that("nothing");
    let sandbox = sandbox("no-word").host_env("SANDBOX_IMAGE", image);
    sandbox.run(["true"]).expect_error(ERROR, &["agent"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn an_agent_that_never_answers_is_not_waited_for_without_end() {
    let (image, _directory) = image_that("sleep");
    let sandbox = sandbox("silent").host_env("SANDBOX_IMAGE", image);
    sandbox.run(["true"]).expect_error(ERROR, &["agent"]);
    sandbox.expect_clean_and_usable();
}

/// A guest image whose program does `task` instead of being an agent.
fn image_that(task: &str) -> (std::path::PathBuf, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    initramfs::write(&path, Some(task)).unwrap();
    (path, directory)
}

#[test]
fn a_full_disk_while_writing_the_state() {
    let sandbox = sandbox("full");
    let state = sandbox.state();
    mount("tmpfs", &state, "tmpfs", MountFlags::empty(), Some(c"size=16k,mode=700"))
        .expect("the tests run as root");
    fill(&state.join("filler"));
    let outcome = sandbox.run(["true"]);
    let _ = unmount(&state, UnmountFlags::DETACH);
    outcome.expect_error(ERROR, &["No space left", state.to_str().unwrap()]);
    sandbox.expect_clean_and_usable();
}

fn fill(path: &Path) {
    let mut size = 64 << 10;
    let mut data = vec![];
    while size > 0 {
        data.resize(data.len() + size, 1);
        if fs::write(path, &data).is_err() {
            data.truncate(data.len() - size);
            size /= 2;
        }
    }
    let _ = fs::write(path, vec![1; 64 << 10]);
}

#[test]
fn a_state_directory_that_cannot_be_made() {
    let sandbox = sandbox("root-file");
    let root = sandbox.directory().join("file");
    fs::write(&root, "").unwrap();
    let words = ["--root", root.to_str().unwrap(), "run", sandbox.bundle.path().to_str().unwrap()];
    let mut command = Command::new(sandbox_tests::place::binary("sandbox"));
    Process::spawn(command.args(words)).wait().expect_error(ERROR, &[root.to_str().unwrap()]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn two_runs_with_one_id() {
    let sandbox = sandbox("twice");
    let mut first = sandbox.spawn(["sh", "-c", "echo ready; read line; echo $line"]);
    first.wait_for_stdout("ready");
    sandbox.run(["true"]).expect_error(ERROR, &[&sandbox.id]);
    first.write(b"unharmed\n");
    first.wait().expect_stdout("ready\nunharmed\n");
    sandbox.expect_clean_and_usable();
}

#[test]
fn a_host_without_hardware_virtualization_says_so() {
    if on_kvm() {
        return skip("a_host_without_hardware_virtualization_says_so", "KVM works here");
    }
    let outcome = sandbox("why").verb(["check"]).expect_code(0);
    assert!(outcome.out().contains("qemu"), "{outcome}");
}
