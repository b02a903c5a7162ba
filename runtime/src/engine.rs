//! What container engines look for on the host, besides what the OCI specification has.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use crate::state::Record;

/// The annotation by which an engine says who it is.
const MANAGER: &str = "io.container.manager";

/// Those that run a container under conmon.
const OVER_CONMON: [&str; 2] = ["libpod", "cri-o"];

/// The file that conmon makes in the bundle when the kernel has killed a process of the container for lack of memory.
const OOM_FILE: &str = "oom";

/// Says that the container's memory limit has killed something, where its engine looks for that. conmon would say so
/// itself, but it watches the host's cgroup, and the kernel that killed is the guest's.
pub fn note_out_of_memory(record: &Record) -> io::Result<()> {
    let manager = record.annotations.get(MANAGER).map(String::as_str);
    if !manager.is_some_and(|manager| OVER_CONMON.contains(&manager)) {
        return Ok(());
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options.open(record.bundle.join(OOM_FILE)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_engines_that_look_for_the_file_get_it() {
        for (manager, noted) in [("libpod", true), ("cri-o", true), ("other", false)] {
            let bundle = tempfile::tempdir().unwrap();
            let mut record = Record::for_tests("box");
            record.bundle = bundle.path().into();
            record.annotations = [(MANAGER.to_owned(), manager.to_owned())].into();
            note_out_of_memory(&record).unwrap();
            assert_eq!(bundle.path().join(OOM_FILE).exists(), noted, "{manager}");
        }
    }
}
