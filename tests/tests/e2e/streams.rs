//! Standard streams: nothing is lost, nothing is mixed, and nobody buffers without bound.

use std::time::Duration;

use sandbox_tests::pattern::{checksum_of, sequence};
use sandbox_tests::sandbox;

/// What goes each way.
const BULK_BYTES: usize = 100_000_000;

#[test]
fn a_hundred_megabytes_of_input_arrive_as_they_were() {
    let sandbox = sandbox("bulk-in").stdin(sequence(BULK_BYTES));
    sandbox.run(["probe", "checksum"]).expect_stdout(&format!("{}\n", checksum_of(BULK_BYTES)));
}

#[test]
fn a_hundred_megabytes_of_output_arrive_as_they_were() {
    let outcome = sandbox("bulk-out").run(["probe", "pattern", &BULK_BYTES.to_string()]);
    assert_eq!(outcome.code(), Some(0), "{outcome}");
    assert!(
        outcome.stdout == sequence(BULK_BYTES),
        "{} bytes came, and not those sent",
        outcome.stdout.len()
    );
}

#[test]
fn output_and_errors_are_separate() {
    let outcome = sandbox("separate").run(["sh", "-c", "echo out; echo err >&2"]).expect_stdout("out\n");
    assert!(outcome.err().lines().any(|line| line == "err"), "{outcome}");
}

#[test]
fn the_last_bytes_before_the_end_are_not_lost() {
    let sandbox = sandbox("last-bytes");
    for _ in 0..3 {
        let outcome = sandbox.run(["sh", "-c", "probe pattern 300001; exit 9"]).expect_code(9);
        assert!(outcome.stdout == sequence(300_001), "{} of 300001 bytes came", outcome.stdout.len());
    }
}

#[test]
fn input_reaches_the_process_while_it_runs_and_its_end_too() {
    let sandbox = sandbox("interactive");
    let mut process = sandbox.spawn(["sh", "-c", "while read line; do echo \"[$line]\"; done; echo end"]);
    process.write(b"one\n");
    process.wait_for_stdout("[one]");
    process.write(b"two\n");
    process.wait_for_stdout("[two]");
    process.close_stdin();
    process.wait().expect_stdout("[one]\n[two]\nend\n");
}

#[test]
fn a_process_that_does_not_read_its_input_ends_all_the_same() {
    sandbox("no-reader").stdin(sequence(1 << 20)).run(["sh", "-c", "exit 6"]).expect_code(6);
}

#[test]
fn a_reader_that_stops_holds_the_writer_and_not_the_host_s_memory() {
    // Standard output is a pipe that nobody reads: the guest must come to a halt, and the host must not buffer.
    let sandbox = sandbox("slow-reader");
    let mut command =
        sandbox.run_command(sandbox.bundle.path(), ["sh", "-c", "probe pattern 400000000; echo $? >&2"]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    command.stdin(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let before = settle(&sandbox);
    let after = settle(&sandbox);
    assert!(child.try_wait().unwrap().is_none(), "the writer is held");
    assert!(after < before + (64 << 20), "the host's side grew from {before} to {after} bytes");
    drop(child.stdout.take());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Private memory of the sandbox's processes other than a machine's own guest memory, after a while.
fn settle(sandbox: &sandbox_tests::Sandbox) -> u64 {
    std::thread::sleep(Duration::from_secs(4));
    let processes = sandbox_tests::leaks::processes(&sandbox.trace());
    let runtime =
        processes.iter().filter(|(_, command)| !command.contains("qemu") && !command.contains("sandbox-vmm"));
    runtime.map(|(pid, _)| resident_bytes(*pid)).sum()
}

fn resident_bytes(pid: nix::unistd::Pid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

#[test]
fn a_reader_that_goes_away_is_seen_by_the_process() {
    let sandbox = sandbox("gone-reader");
    let mut command =
        sandbox.run_command(sandbox.bundle.path(), ["sh", "-c", "trap '' PIPE; yes; echo after >&2"]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    command.stdin(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut first = [0; 2];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("after"), "`yes` was to fail and the shell to go on: {errors}");
}

#[test]
fn a_process_that_claims_the_streams_of_others_gets_none_and_harms_nobody() {
    let sandbox = sandbox("claims");
    let claim = format!(r#"{{"container": "{}", "stream": "stdout", "secret": "guess"}}"#, sandbox.id);
    let script = r#"probe stream-hellos "$0" && echo still here"#;
    sandbox.run(["sh", "-c", script, &claim]).expect_stdout("0 of 100 taken\nstill here\n");
}
