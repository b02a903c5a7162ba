//! `tmpcopyup`: a tmpfs that begins with what the directory that it hides has in it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat, fchown,
    fstat, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::{Errno, Result};

/// How deep a tree may be: each level holds two descriptors.
const DEEPEST: u32 = 128;

/// Copies the content of a directory, and the directory's own owner, with modes, owners and times. Sockets and
/// extended attributes are left out.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let own = fstat(from)?;
    // A mount that is attached nowhere comes as a descriptor that can only be looked up in.
    let to = openat(to, c".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    fchown(&to, Some(Uid::from_raw(own.st_uid)), Some(Gid::from_raw(own.st_gid)))?;
    content(from, to.as_fd(), 0)
}

fn content(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> Result<()> {
    if depth > DEEPEST {
        return Err(Errno::NAMETOOLONG);
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let inner = openat(from, name, flags, Mode::empty())?;
                let copy = openat(to, name, flags, Mode::empty())?;
                content(inner.as_fd(), copy.as_fd(), depth + 1)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut original = File::from(openat(from, name, flags, Mode::empty())?);
                let new = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let mut copy = File::from(openat(to, name, new, Mode::RWXU)?);
                std::io::copy(&mut original, &mut copy)
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            }
            FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?, to, name)?,
            FileType::Socket => continue,
            _ => mknodat(to, name, kind, Mode::RWXU, stat.st_rdev)?,
        }
        describe(to, name, kind, &stat)?;
    }
    Ok(())
}

/// Gives a copy the owner, mode and times of the original.
fn describe(to: BorrowedFd<'_>, name: &std::ffi::CStr, kind: FileType, original: &Stat) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(original.st_uid), Gid::from_raw(original.st_gid));
    chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        chmodat(to, name, Mode::from_raw_mode(original.st_mode), AtFlags::empty())?;
    }
    let time = |seconds, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: i64::try_from(nanos).unwrap_or(0) };
    let times = Timestamps {
        last_access: time(original.st_atime, original.st_atime_nsec),
        last_modification: time(original.st_mtime, original.st_mtime_nsec),
    };
    utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_tree_is_copied_with_modes_and_times() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), "text").unwrap();
        fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(from.path().join("d"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("d/f", from.path().join("l")).unwrap();
        let open = |path| File::open(path).unwrap();
        copy(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        assert_eq!(fs::read_to_string(to.path().join("l")).unwrap(), "text");
        assert!(fs::symlink_metadata(to.path().join("l")).unwrap().is_symlink());
        for (name, mode) in [("d/f", 0o4711), ("d", 0o1777)] {
            let [old, new] = [&from, &to].map(|root| fs::metadata(root.path().join(name)).unwrap());
            assert_eq!(new.permissions().mode() & 0o7777, mode, "{name}");
            assert_eq!(new.modified().unwrap(), old.modified().unwrap(), "{name}");
        }
    }
}
