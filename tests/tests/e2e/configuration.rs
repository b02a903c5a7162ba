//! The operator's configuration, as the command line and the shim read it.

use std::fs;

use sandbox_tests::containerd::SHIM;
use sandbox_tests::{Containerd, Sandbox, sandbox};

/// Gives a sandbox a configuration of this text.
fn configured(sandbox: Sandbox, text: &str) -> Sandbox {
    let path = sandbox.directory().join("config.toml");
    fs::write(&path, text).expect("a file");
    sandbox.host_env("SANDBOX_CONFIG", path)
}

#[test]
fn the_files_in_their_order_say_what_a_machine_is() {
    let sandbox = configured(sandbox("config"), "[machine]\nmemory = \"256M\"\nvcpus = 3\n");
    let drop_ins = sandbox.directory().join("config.toml.d");
    fs::create_dir(&drop_ins).expect("a directory");
    fs::write(drop_ins.join("10-vcpus.toml"), "machine.vcpus = 2\n").expect("a file");
    let outcome = sandbox.run(["sh", "-c", "nproc; grep MemTotal /proc/meminfo"]).expect_code(0);
    let words: Vec<String> = outcome.out().split_whitespace().map(str::to_owned).collect();
    let kib: u64 = words[2].parse().expect("a number");
    assert!(words[0] == "2" && (100 << 10..=256 << 10).contains(&kib), "{outcome}");
    // A flag comes first.
    sandbox.option("--cpus", "1").run(["nproc"]).expect_stdout("1\n");
}

#[test]
fn what_is_wrong_with_it_is_said_with_its_place() {
    for (text, words) in [
        ("[machine]\nmemery = \"1G\"\n", ["config.toml:2:1: unknown field `memery`", "`memory`"]),
        ("[machine]\nvcpus = 0\n", ["config.toml:2:9: ", "from 1 to 254"]),
        ("machine.vmm = \"/no/such\"\n", ["sandbox-vmm /no/such", "named by machine.vmm"]),
    ] {
        let sandbox = configured(sandbox("config-wrong"), text);
        sandbox.run(["true"]).expect_error(125, &words);
        sandbox.verb(["check"]).expect_code(1).expect_words(&words);
        // Whoever names the state root needs none.
        sandbox.verb(["list", "--quiet"]).expect_stdout("");
    }
    let missing = sandbox("config-missing").global("--config").global("/no/such.toml");
    missing.run(["true"]).expect_error(125, &["cannot read the configuration /no/such.toml"]);
}

#[test]
fn annotations_are_honoured_where_the_operator_allows_them() {
    let annotated = |name: &str, value: &str| {
        sandbox("annotated").config(|config| config["annotations"] = serde_json::json!({name: value}))
    };
    let refused = ["annotations.dev.sandbox.vcpus", "the operator of this host does not allow it"];
    annotated("dev.sandbox.vcpus", "2").run(["nproc"]).expect_error(125, &refused);
    let allowed = "annotations.allowed = [\"dev.sandbox.vcpus\", \"dev.sandbox.root-writes\"]\n";
    configured(annotated("dev.sandbox.vcpus", "2"), allowed).run(["nproc"]).expect_stdout("2\n");
    let wrong = configured(annotated("dev.sandbox.vcpus", "many"), allowed);
    wrong.run(["nproc"]).expect_error(125, &["annotations.dev.sandbox.vcpus", "`many`"]);

    let through = configured(annotated("dev.sandbox.root-writes", "through"), allowed);
    through.run(["sh", "-c", "echo data >/file"]).expect_code(0);
    assert_eq!(fs::read_to_string(through.bundle.root("file")).expect("a file"), "data\n");
}

#[test]
fn the_shim_reads_it_for_each_pod() {
    let Some(containerd) = Containerd::new("ctr-config") else { return };
    let annotation = "--rm --annotation dev.sandbox.vcpus=2";
    containerd.run("box", annotation, "nproc").expect_error(1, &["dev.sandbox.vcpus", "does not allow it"]);
    containerd.operator("machine.vcpus = 3\n");
    containerd.run("box", "--rm", "nproc").expect_stdout("3\n");
    containerd.operator("annotations.allowed = [\"dev.sandbox.vcpus\"]\n");
    containerd.run("box", annotation, "nproc").expect_stdout("2\n");
    containerd.operator("machine.vcpus = 0\n");
    containerd.run("box", "--rm", "nproc").expect_error(1, &["sandbox.toml:1:17: ", "from 1 to 254"]);

    // It is broken under a shim that then dies, and nothing is left all the same.
    containerd.operator("");
    containerd.detach("box", "while :; do sleep 0.1; done");
    containerd.operator("nonsense");
    for shim in containerd.processes(&format!("{SHIM} -namespace")) {
        nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).expect("it runs");
    }
    containerd.wait_for_status("box", None);
    containerd.expect_no_sandbox();
    containerd.line("container rm box").expect_code(0);
}
