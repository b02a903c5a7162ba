//! Verbs that run nothing: `check`, `spec`, `version`, help.

use sandbox_tests::place::{machine, on_kvm};
use sandbox_tests::sandbox;

#[test]
fn check_says_what_the_host_offers_in_text_and_json() {
    let sandbox = sandbox("check");
    let text = sandbox.verb(["check"]).expect_code(0);
    for word in ["kvm", "qemu", "kernel", "image"] {
        assert!(text.out().to_lowercase().contains(word), "no {word}\n{text}");
    }
    let json = sandbox.verb(["check", "--format", "json"]).expect_code(0);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(report.is_object(), "{json}");
}

#[test]
fn auto_takes_the_machine_that_works_and_says_why() {
    let sandbox = sandbox("auto").machine("auto");
    let outcome = sandbox.run(["echo", "x"]).expect_stdout("x\n");
    assert!(outcome.err().contains(&machine()), "the machine is named\n{outcome}");
}

#[test]
fn kvm_where_it_cannot_work_is_an_error_that_says_why() {
    let sandbox = sandbox("no-kvm").machine("kvm");
    if on_kvm() {
        return sandbox_tests::skip("kvm_where_it_cannot_work", "KVM works here");
    }
    sandbox.run(["true"]).expect_error(125, &["kvm", "--machine"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn version_names_the_runtime_and_the_specification() {
    let outcome = sandbox("version").verb(["--version"]).expect_code(0);
    assert!(
        outcome.out().starts_with(&format!("sandbox version {}", env!("CARGO_PKG_VERSION"))),
        "{outcome}"
    );
    assert!(outcome.out().contains("\nspec: "), "{outcome}");
}

#[test]
fn a_configuration_for_other_users_than_root_is_not_written() {
    let sandbox = sandbox("spec-rootless");
    let empty = sandbox.directory().join("empty");
    std::fs::create_dir(&empty).expect("a directory");
    let spec = |words: &[&str]| {
        let fixed = ["spec", "--bundle", empty.to_str().unwrap()];
        sandbox.verb([&fixed, words].concat())
    };
    spec(&["--rootless"]).expect_error(1, &["--rootless", "root", "uidMappings"]);
    assert!(!empty.join("config.json").exists());
    spec(&[]).expect_stdout("");
    assert!(empty.join("config.json").exists());
}

#[test]
fn a_word_that_is_no_verb_is_refused() {
    sandbox("verb").verb(["frobnicate"]).expect_error(2, &["frobnicate"]);
}
