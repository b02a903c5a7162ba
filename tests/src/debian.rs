//! Debian root file systems, for tests that need a whole system.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::place::skip;
use crate::process::Process;

/// The environment variable that names the archive, where there is no source tree to make it with.
const ARCHIVE: &str = "SANDBOX_TEST_DEBIAN";

/// The packages of a system whose first process is systemd. The lab's script has the same list.
const PACKAGES: [&str; 2] = ["systemd-sysv", "dbus"];

/// The archive of a Debian with systemd, which is made once and kept. `None`, and a notice, where it cannot be made.
pub fn archive(test: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(ARCHIVE) {
        return Some(path.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/debian-root");
    let made = Command::new(script).args(PACKAGES).stderr(Stdio::inherit()).output();
    let made = made.expect("scripts/debian-root can be started");
    if !made.status.success() {
        skip(test, "scripts/debian-root cannot make a Debian root file system: see above");
        return None;
    }
    Some(String::from_utf8(made.stdout).expect("a path").trim().into())
}

/// Unpacks an archive into a directory, which is emptied first.
pub fn unpack(archive: &Path, into: &Path) {
    std::fs::remove_dir_all(into).expect("the directory can be emptied");
    std::fs::create_dir(into).expect("a directory");
    let mut command = Command::new("tar");
    // A container has devices of its own.
    command.arg("-xf").arg(archive).arg("-C").arg(into).arg("--exclude=./dev/*");
    Process::spawn(&mut command).wait().expect_code(0);
}
