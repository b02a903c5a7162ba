//! Many sandboxes at once.

use sandbox_tests::place::on_kvm;
use sandbox_tests::sandbox;

/// How many run at once: fewer on KVM, which the lab emulates on two processors.
fn at_once() -> usize {
    if on_kvm() { 8 } else { 20 }
}

#[test]
fn many_sandboxes_run_at_once() {
    let sandboxes: Vec<_> = (0..at_once()).map(|_| sandbox("many").option("--memory", "32M")).collect();
    let mut running: Vec<_> = (sandboxes.iter().enumerate())
        .map(|(number, sandbox)| {
            sandbox.spawn([
                "sh",
                "-c",
                &format!("echo ready-{number}; read line; echo $line-{number}; exit {number}"),
            ])
        })
        .collect();
    for (number, process) in running.iter_mut().enumerate() {
        process.wait_for_stdout(&format!("ready-{number}"));
    }
    // All of them are up now.
    for process in &mut running {
        process.write(b"go\n");
    }
    for (number, process) in running.into_iter().enumerate() {
        let outcome = process.wait().expect_code(i32::try_from(number).unwrap());
        assert_eq!(outcome.out(), format!("ready-{number}\ngo-{number}\n"));
    }
}
