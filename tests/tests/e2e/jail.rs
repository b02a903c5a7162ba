//! What holds the processes of a machine, as the host's kernel says it.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;

use sandbox_tests::process::Process;
use sandbox_tests::{leaks, sandbox};
use serde_json::Value;

/// What the threads that serve files may keep.
const OF_FILES: [&str; 7] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETUID"];

#[test]
fn every_thread_of_a_machine_is_confined() {
    let sandbox = sandbox("confined").command(["sh", "-c", "echo ready; sleep 1234"]);
    let mut container = sandbox.start();
    container.wait_for_stdout("ready");
    let id = sandbox.trace().id;
    let json = sandbox.verb(["check", "--security", &id, "--format", "json"]).expect_code(0);
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    let processes = report["processes"].as_array().unwrap();
    assert_eq!(processes[0]["program"], "sandbox-vmm", "{json}");
    assert_eq!(processes[0]["own_root"], true, "{json}");
    let mut serving = 0;
    for process in processes {
        assert_eq!(process["core_dumps"], false, "{json}");
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
