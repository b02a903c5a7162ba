//! Where the tests run: the binaries under test, the machine they use, and how long to wait for it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

/// The path of one of the binaries under test.
///
/// `SANDBOX_BIN_DIR` names their directory; without it they are taken from beside the test's own build.
///
/// # Panics
///
/// When it is not there.
pub fn binary(name: &str) -> PathBuf {
    let path = binary_directory().join(name);
    assert!(path.exists(), "{} is missing: build it first (cargo build --workspace)", path.display());
    path
}

fn binary_directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("SANDBOX_BIN_DIR") {
        return directory.into();
    }
    let test = std::env::current_exe().expect("a test knows its own path");
    // target/…/debug/deps/NAME-HASH
    test.ancestors().nth(2).expect("a test stands in a build directory").to_owned()
}

/// The guest kernel or image: `SANDBOX_KERNEL`, `SANDBOX_IMAGE`, or the source tree's build directory.
///
/// # Panics
///
/// When it is not there.
pub fn artefact(variable: &str, name: &str) -> PathBuf {
    let path = match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../build").join(name),
    };
    assert!(path.exists(), "{} is missing: build it first (make build)", path.display());
    path
}

/// The machine under test, as `--machine` takes it: `SANDBOX_TEST_MACHINE`, or `qemu`, which works anywhere.
pub fn machine() -> String {
    // Every test asks for it before it can fail for what the machine does.
    tell_failures_at_once();
    std::env::var("SANDBOX_TEST_MACHINE").unwrap_or_else(|_| "qemu".into())
}

/// Whether the machine under test is KVM.
pub fn on_kvm() -> bool {
    machine() == "kvm"
}

/// The most time that anything in a test may take: far more than it needs, since machines are slow at times.
pub fn patience() -> Duration {
    let seconds = std::env::var("SANDBOX_TEST_PATIENCE").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(if on_kvm() { 240 } else { 120 }))
}

/// From now on, a failure is told on the real standard error when it happens too: the harness keeps it until all tests are
/// through, and a run that is killed at its time limit would keep it for good.
fn tell_failures_at_once() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let keep = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            keep(panic);
            let test = std::thread::current();
            say(&format!("FAILING {}: {panic}\n", test.name().unwrap_or("a thread of a test")));
        }));
    });
}

/// Says on the real standard error, which the harness does not capture, that a test did not run, and why.
pub fn skip(test: &str, reason: &str) {
    say(&format!("SKIPPED {test}: {reason}\n"));
}

/// Writes to the real standard error.
fn say(notice: &str) {
    // A closed standard error is nothing that a test could help.
    let _ = std::io::stderr().write_all(notice.as_bytes());
}

/// Where programs are looked up when a test starts from an empty environment.
pub const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
