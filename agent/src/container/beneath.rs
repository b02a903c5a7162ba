//! Paths inside a container's root, which belongs to the hostile side.
//!
//! Every path is resolved by the kernel with the container's root as the root (`RESOLVE_IN_ROOT`), so that
//! neither `..` nor an absolute symbolic link leads out of it, and what is found is held by a descriptor. Paths
//! are never put together as strings and opened from outside.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2, readlinkat};
use rustix::io::Errno;

/// The most dangling links followed while a path is made, as in the kernel.
const MAX_LINKS: u32 = 40;

/// How often a resolution that raced with a rename is tried again.
const MAX_RACES: u32 = 64;

/// A path in the root could not be opened or made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path} in the container's root: {source}")]
pub struct BeneathError {
    /// What was to be done.
    pub action: &'static str,
    /// The path, as it was asked for.
    pub path: PathBuf,
    /// Why not.
    pub source: Errno,
}

/// What a missing path is made as.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// An empty regular file.
    File,
}

impl Kind {
    /// What kind of mount point this needs.
    pub fn of(fd: &OwnedFd) -> rustix::io::Result<Self> {
        match FileType::from_raw_mode(fstat(fd)?.st_mode) {
            FileType::Directory => Ok(Self::Directory),
            _ => Ok(Self::File),
        }
    }
}

/// The root directory of a container.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// Takes the root's descriptor.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Opens what is there.
    pub fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, BeneathError> {
        self.try_open(path, flags).map_err(|source| error("open", path, source))
    }

    /// Opens what is there, without the rights to its content. `None`: nothing is there.
    pub fn look(&self, path: &Path) -> Result<Option<OwnedFd>, BeneathError> {
        match self.try_open(path, OFlags::PATH) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(source) => Err(error("open", path, source)),
        }
    }

    /// Opens the directory or file, and makes it and what leads to it where it is missing.
    pub fn make(&self, path: &Path, kind: Kind) -> Result<OwnedFd, BeneathError> {
        self.reach(path, kind, 0).map_err(|source| error("make", path, source))
    }

    /// Makes the directory that holds a path and returns it with the path's last name.
    pub fn parent(&self, path: &Path) -> Result<(OwnedFd, OsString), BeneathError> {
        let failed = |source| error("make", path, source);
        let (parent, name) = split(path).map_err(failed)?;
        Ok((self.reach(parent, Kind::Directory, 0).map_err(failed)?, name.to_owned()))
    }

    fn reach(&self, path: &Path, kind: Kind, links: u32) -> rustix::io::Result<OwnedFd> {
        match self.try_open(path, OFlags::PATH) {
            Err(Errno::NOENT) => {}
            found => return found,
        }
        let (parent_path, name) = split(path)?;
        let parent = self.reach(parent_path, Kind::Directory, links)?;
        let made = match kind {
            Kind::Directory => mkdirat(&parent, name, Mode::from(0o755)),
            Kind::File => openat(
                &parent,
                name,
                OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::from(0o644),
            )
            .map(drop),
        };
        match made {
            Ok(()) => openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()),
            Err(Errno::EXIST) if links < MAX_LINKS => {
                // A symbolic link to nothing: what it names is made, inside the root too.
                let target = readlinkat(&parent, name, Vec::new())?;
                let target: OsString = std::os::unix::ffi::OsStringExt::from_vec(target.into_bytes());
                self.reach(&parent_path.join(target), kind, links + 1)
            }
            Err(Errno::EXIST) => Err(Errno::LOOP),
            Err(e) => Err(e),
        }
    }

    fn try_open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..MAX_RACES {
            match openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                done => return done,
            }
        }
        Err(Errno::AGAIN)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn split(path: &Path) -> rustix::io::Result<(&Path, &std::ffi::OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent.as_os_str().is_empty() => Ok((Path::new("/"), name)),
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(Errno::NOENT),
    }
}

fn error(action: &'static str, path: &Path, source: Errno) -> BeneathError {
    BeneathError { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (dir, Root::new(fd))
    }

    #[test]
    fn missing_directories_and_files_are_made() {
        let (dir, root) = root();
        root.make(Path::new("/a/b/c"), Kind::Directory).unwrap();
        root.make(Path::new("/a/f"), Kind::File).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        assert!(dir.path().join("a/f").is_file());
        root.make(Path::new("/a/f"), Kind::File).unwrap();
    }

    #[test]
    fn links_lead_nowhere_but_into_the_root() {
        let (dir, root) = root();
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().join("made-outside");
        symlink(&target, dir.path().join("absolute")).unwrap();
        symlink("../../../../../../../../etc", dir.path().join("up")).unwrap();
        root.make(Path::new("/absolute"), Kind::Directory).unwrap();
        root.make(Path::new("/up/file"), Kind::File).unwrap();
        assert!(!target.exists());
        assert!(dir.path().join(target.strip_prefix("/").unwrap()).is_dir());
        assert!(dir.path().join("etc/file").is_file());
    }

    #[test]
    fn a_circle_of_links_is_an_error() {
        let (dir, root) = root();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        assert_eq!(root.make(Path::new("/a/x"), Kind::File).unwrap_err().source, Errno::LOOP);
    }

    #[test]
    fn nothing_is_none_and_dots_end_at_the_root() {
        let (_dir, root) = root();
        assert!(root.look(Path::new("/none")).unwrap().is_none());
        assert!(root.look(Path::new("/../../..")).unwrap().is_some());
    }
}
