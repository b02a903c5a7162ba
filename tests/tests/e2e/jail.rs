//! What holds the processes of a machine, as the host's kernel says it.

use sandbox_tests::sandbox;
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
        for namespace in ["mnt", "net", "ipc", "uts"] {
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
