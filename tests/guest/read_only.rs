//! A directory that must not be written to in any way.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use crate::Outcome;

/// Tries every kind of write below a directory that has a file `file` and a directory `directory`.
pub fn check(arguments: &[String]) -> Outcome {
    let top = Path::new(arguments.first().ok_or("a directory is missing")?);
    let succeeded: Vec<&str> =
        attempts(top).into_iter().filter(|(_, r)| r.is_ok()).map(|(what, _)| what).collect();
    if succeeded.is_empty() {
        Ok(())
    } else {
        Err(format!("these writes went through: {}", succeeded.join(", ")))
    }
}

fn attempts(top: &Path) -> Vec<(&'static str, io::Result<()>)> {
    let (file, directory, new) = (top.join("file"), top.join("directory"), top.join("new"));
    let mode = Mode::from_raw_mode(0o600);
    vec![
        ("create", File::create_new(&new).map(drop)),
        ("open for writing", OpenOptions::new().write(true).open(&file).map(drop)),
        ("open for appending", OpenOptions::new().append(true).open(&file).map(drop)),
        ("truncate by opening", OpenOptions::new().write(true).truncate(true).open(&file).map(drop)),
        (
            "truncate",
            rustix::fs::open(&file, rustix::fs::OFlags::RDONLY, mode)
                .and_then(|f| rustix::fs::ftruncate(f, 0))
                .map_err(Into::into),
        ),
        ("mkdir", fs::create_dir(&new)),
        ("rmdir", fs::remove_dir(&directory)),
        ("unlink", fs::remove_file(&file)),
        ("rename", fs::rename(&file, &new)),
        ("hard link", fs::hard_link(&file, &new)),
        ("symbolic link", symlink("file", &new)),
        ("mknod", rustix::fs::mknodat(CWD, &new, FileType::Fifo, mode, 0).map_err(Into::into)),
        ("chmod", rustix::fs::chmod(&file, Mode::from_raw_mode(0o777)).map_err(Into::into)),
        ("chown", std::os::unix::fs::chown(&file, Some(1), Some(1))),
        ("set times", set_times(&file)),
        ("set xattr", rustix::fs::setxattr(&file, "user.new", b"x", XattrFlags::empty()).map_err(Into::into)),
        ("set times of the top", set_times(top)),
    ]
}

fn set_times(path: &Path) -> io::Result<()> {
    let time = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::empty()).map_err(Into::into)
}
