//! What holds the processes of a machine, as the host's kernel says it.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;

use sandbox_tests::bundle::Bundle;
use sandbox_tests::process::Process;
use sandbox_tests::{Sandbox, leaks, sandbox};
use serde_json::{Value, json};

/// What the threads that serve files may keep.
const OF_FILES: [&str; 7] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETUID"];

#[test]
fn every_thread_of_a_machine_is_confined() {
    let sandbox = sandbox("confined").command(["sh", "-c", "echo ready; sleep 1234"]);
    let cgroup = format!("/{}", sandbox.id);
    let sandbox = sandbox.config(|config| config["linux"]["cgroupsPath"] = cgroup.clone().into());
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    let id = sandbox.trace().id;
    let json = sandbox.verb(["check", "--security", &id, "--format", "json"]).expect_code(0);
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    let processes = report["processes"].as_array().unwrap();
    assert_eq!(processes[0]["program"], "sandbox-vmm", "{json}");
    let mut serving = 0;
    for process in processes {
        assert_eq!(process["core_dumps"], false, "{json}");
        assert_eq!(process["own_root"], true, "{json}");
        assert!(process["descriptors"].as_u64() < process["most_descriptors"].as_u64(), "{json}");
        let cgroups = process["cgroups"].as_array().unwrap();
        assert!(cgroups.iter().any(|it| it.as_str().unwrap().ends_with(&cgroup)), "{json}");
        for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
            assert_eq!(process["own_namespaces"][namespace], true, "{namespace}: {json}");
        }
        for thread in process["threads"].as_array().unwrap() {
            assert_eq!(thread["system_call_filter"], true, "{thread}\n{json}");
            assert_eq!(thread["no_new_privileges"], true, "{thread}\n{json}");
            let capabilities = thread["capabilities"].as_array().unwrap();
            if *capabilities == ["CAP_KILL"] {
                assert_eq!(thread["tid"], process["pid"], "the first thread alone kills QEMU\n{json}");
                continue;
            }
            let is_of_files = |name: &Value| OF_FILES.contains(&name.as_str().unwrap());
            assert!(capabilities.iter().all(is_of_files), "{thread}\n{json}");
            serving += usize::from(!capabilities.is_empty());
        }
    }
    assert_eq!(serving, 1, "one thread serves files\n{json}");
    let text = sandbox.verb(["check", "--security", &id]).expect_code(0);
    assert!(!text.out().contains("NO ") && text.out().contains("system-call filter"), "{text}");
    container.end();
}

/// What is said of the processes of a machine.
fn processes(sandbox: &Sandbox) -> Vec<Value> {
    let json = sandbox.verb(["check", "--security", &sandbox.id, "--format", "json"]).expect_code(0);
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    report["processes"].as_array().unwrap().clone()
}

#[test]
fn a_machine_has_ids_of_its_own_and_nothing_of_root_s_where_it_changes_no_files() {
    let sandboxes = [sandbox("one-id"), sandbox("another-id")];
    let runs = sandboxes.each_ref().map(|sandbox| {
        let mut run = sandbox.spawn(["sh", "-c", "echo ready; read line"]);
        run.wait_for_stdout("ready");
        run
    });
    let mut seen = BTreeSet::new();
    for process in sandboxes.iter().flat_map(processes) {
        let threads = process["threads"].as_array().unwrap();
        let ids: BTreeSet<_> = threads.iter().map(|thread| thread["uid"].as_u64().unwrap()).collect();
        let [id] = ids.iter().copied().collect::<Vec<_>>()[..] else { panic!("several ids: {process}") };
        assert!((0x7800_0000..0x7a00_0000).contains(&id), "{process}");
        assert!(seen.insert(id), "{id} is another process's too: {seen:?}");
        for thread in threads {
            let harmless = json!(["CAP_DAC_OVERRIDE"]);
            let capabilities = &thread["capabilities"];
            assert!(
                [json!([]), harmless, json!(["CAP_KILL"])].contains(capabilities),
                "{thread} of {process}"
            );
        }
    }
    for mut run in runs {
        run.write(b"\n");
        run.wait().expect_code(0);
    }
}

#[test]
fn of_a_machine_that_changes_files_the_thread_that_serves_them_alone_is_root_s() {
    let sandbox = sandbox("root-thread").flag("--persist");
    let mut run = sandbox.spawn(["sh", "-c", "touch /new; mkdir -m 2775 /dir; echo ready; read line"]);
    run.wait_for_stdout("ready");
    let mut serving = 0;
    for process in processes(&sandbox) {
        for thread in process["threads"].as_array().unwrap() {
            let is_root = thread["uid"] == 0;
            assert_eq!(is_root, thread["capabilities"].as_array().unwrap().len() > 1, "{thread}");
            serving += usize::from(is_root);
        }
    }
    assert_eq!(serving, 1, "one thread serves files");
    run.write(b"\n");
    run.wait().expect_code(0);
    for made in ["new", "dir"] {
        let data = fs::metadata(sandbox.bundle.root(made)).unwrap();
        assert_eq!((data.uid(), data.gid()), (0, 0), "{made}");
    }
}

#[test]
fn what_joins_a_machine_that_changes_no_files_brings_none_to_change() {
    let pod = sandbox("foreground-pod");
    let mut run = pod.spawn(["sh", "-c", "echo ready; read line"]);
    run.wait_for_stdout("ready");
    let bundle = Bundle::make(&pod.directory().join("member"));
    let mut config = bundle.config();
    config["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": pod.id,
    });
    bundle.write(&config);
    let member = format!("{}-member", pod.id);
    let words = ["create".as_ref(), "--bundle".as_ref(), bundle.path().as_os_str(), member.as_ref()];
    pod.verb(words).expect_error(1, &["runs in the foreground", "--detach"]);
    run.write(b"\n");
    run.wait().expect_code(0);
}

#[test]
fn what_has_no_machine_cannot_be_looked_at() {
    let sandbox = sandbox("unconfined").command(["true"]);
    let _ = sandbox.verb(["check", "--security", "nobody"]).expect_error(1, &["nobody"]);
    let _container = sandbox.start();
    sandbox.wait_for_status("stopped");
    let id = sandbox.trace().id;
    let _ = sandbox.verb(["check", "--security", &id]).expect_error(1, &["has no machine", &id]);
    sandbox.on("delete", []).expect_stdout("");
}

#[test]
fn a_descriptor_that_the_caller_leaks_reaches_no_machine() {
    let sandbox = sandbox("leaky");
    let secret = sandbox.directory().join("secret");
    fs::write(&secret, "secret").unwrap();
    let file = fs::File::open(&secret).unwrap();
    let mut command = sandbox.run_command(sandbox.bundle.path(), ["sh", "-c", "echo ready; read line"]);
    let leaked = file.as_raw_fd();
    // SAFETY: between fork and exec, one system call on a descriptor that is open as long as the command lives.
    unsafe {
        command.pre_exec(move || match libc::fcntl(leaked, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut run = Process::spawn(&mut command);
    run.wait_for_stdout("ready");
    let machines: Vec<_> = leaks::processes(&sandbox.trace())
        .into_iter()
        .filter(|(_, command)| command.contains("/sandbox-vmm") || command.starts_with("qemu"))
        .collect();
    assert!(!machines.is_empty());
    for (pid, command) in machines {
        let open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .collect();
        assert!(!open.contains(&secret), "{command}: {open:?}");
    }
    run.write(b"\n");
    run.wait().expect_code(0);
}
