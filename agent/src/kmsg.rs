//! The kernel's log, which is the only place a guest can write to that outlives it.

use std::fs::File;
use std::io::{self, Write};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

const PATH: &str = "/dev/kmsg";

/// Writes a line to the kernel's log, or to standard error where there is none.
///
/// Failing to log is not an error: there is nowhere left to report it.
pub fn log(line: &str) {
    let written = open().and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Opens the log for writing. Before the guest's devices are there, the node is made by hand.
pub fn open() -> io::Result<File> {
    let open = || File::options().write(true).open(PATH);
    open().or_else(|_| {
        mknodat(CWD, PATH, FileType::CharacterDevice, Mode::from(0o600), makedev(1, 11))?;
        open()
    })
}
