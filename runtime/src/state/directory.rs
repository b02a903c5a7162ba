//! A sandbox's directory under the state root, and who owns it.
//!
//! `<root>/<id>/` belongs to whoever holds its lock (`flock` on the directory itself, so that there is no lock
//! file whose removal could race): the sandbox's monitor, from before there is anything in it to after it is
//! removed. The kernel drops the lock when the monitor is gone, however it went. A directory that nobody has
//! locked is therefore the leftover of a sandbox whose monitor was killed, and anyone may remove it; unless its
//! record says that it is kept: then it is what `sandbox create` made, has stopped, and waits to be deleted.
//!
//! A state root may be any directory, so nothing is removed that is not plainly ours: mode 01700 (the sticky bit
//! means nothing on a directory that only its owner may enter, and nobody else sets it so), and only the names
//! that we use.
//!
//! What is in it: `state.json`, `monitor.sock` and `vmm.sock` (control sockets), beside the latter what the machine
//! needs for a moment of its start, and `vsock/` with the sockets that the guest's connections arrive at.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use sandbox_vmm_api::{SHARE_LINK, VSOCK_LINK};

use super::{Record, SandboxId, StateError};
use crate::replace::replace;

/// The mode that marks our directories.
const MODE: u32 = 0o1700;

/// How the name of a root begins that holds the sandboxes of a namespace of containerd. It is there as long as there is
/// something in it: whoever removes the last of it removes it as well. Who has its lock is about to put something into
/// it, or to remove it.
pub const NAMESPACE_MARK: char = '@';

/// How long somebody may have the lock of such a root to remove it.
const LEAVE_TIME: Duration = Duration::from_secs(1);

/// How often a claim is tried again when a sweep of somebody else gets in between.
const CLAIM_ATTEMPTS: usize = 10;

/// How long a sweep may take to find that there is nothing in a directory.
const SWEEP_TIME: Duration = Duration::from_millis(20);

const RECORD: &str = "state.json";
const NEW_RECORD: &str = "state.json.new";
const MONITOR_SOCKET: &str = "monitor.sock";
const VMM_SOCKET: &str = "vmm.sock";
const VSOCK: &str = "vsock";

/// A sandbox's directory, locked. Dropping it removes the directory, or all but the record of one that is kept.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: OwnedFd,
    at_end: AtEnd,
}

/// What becomes of a directory when its owner lets go of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum AtEnd {
    /// It goes.
    Remove,
    /// The record stays.
    KeepRecord,
    /// All of it stays.
    Leave,
}

/// How long the machine of a monitor that was killed, which dies with it, may still make its sockets.
const DYING_TIME: Duration = Duration::from_secs(5);

impl StateDir {
    /// Makes the directory of a new sandbox, replacing a dead one of the same id.
    pub fn claim(root: &Path, id: &SandboxId) -> Result<Self, StateError> {
        let path = root.join(id.as_str());
        make_root(root)?;
        let mut made = false;
        for _ in 0..CLAIM_ATTEMPTS {
            match DirBuilder::new().mode(MODE).create(&path) {
                Ok(()) => made = true,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                // Somebody has left the root, which was empty.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    make_root(root)?;
                    continue;
                }
                Err(error) => return Err(StateError::Make { path, error }),
            }
            match try_lock(&path)? {
                Locked::Ours(lock) if is_ours(&path, lock.as_fd()) => {
                    let directory = Self { path, lock, at_end: AtEnd::Remove };
                    if directory.record_is_kept() {
                        directory.leave();
                        return Err(StateError::InUse { id: id.clone() });
                    }
                    directory.empty()?;
                    return Ok(directory);
                }
                Locked::Ours(_) => return Err(StateError::Foreign { path }),
                // A sweep may look at a directory between its making and its locking here.
                Locked::Theirs if made => std::thread::sleep(SWEEP_TIME),
                Locked::Theirs => return Err(StateError::InUse { id: id.clone() }),
                Locked::Gone => {}
            }
        }
        Err(StateError::InUse { id: id.clone() })
    }

    /// Locks the directory of a sandbox whose owner is dead. `None`: the owner lives, or there is none such.
    pub fn stale(path: &Path) -> Result<Option<Self>, StateError> {
        match try_lock(path)? {
            Locked::Ours(lock) if is_ours(path, lock.as_fd()) => {
                Ok(Some(Self { path: path.into(), lock, at_end: AtEnd::Remove }))
            }
            Locked::Ours(_) | Locked::Theirs | Locked::Gone => Ok(None),
        }
    }

    /// The names in it.
    pub fn paths(&self) -> StateDirPaths<'_> {
        StateDirPaths(&self.path)
    }

    /// Replaces `state.json`, so that a reader sees the old one or the new one and nothing between.
    pub fn write(&self, record: &Record) -> Result<(), StateError> {
        let (path, temporary) = (self.paths().record(), self.path.join(NEW_RECORD));
        let error = |error| StateError::Write { path: path.clone(), error };
        let mut bytes = serde_json::to_vec(record).map_err(|e| error(e.into()))?;
        bytes.push(b'\n');
        replace(&path, &temporary, &bytes).map_err(error)
    }

    /// From now on the record stays when the owner goes.
    pub fn keep(&mut self) {
        self.at_end = AtEnd::KeepRecord;
    }

    /// Whether the record says that it is to stay. One that cannot be read is not for us to throw away.
    pub fn record_is_kept(&self) -> bool {
        super::read_record(&self.path).map_or(true, |record| record.is_some_and(|record| record.kept))
    }

    /// Lets go of the directory and removes nothing.
    pub fn leave(mut self) {
        self.at_end = AtEnd::Leave;
    }

    /// Removes the directory. Says why where that fails, which dropping cannot.
    pub fn remove(self) -> Result<(), StateError> {
        let removed = self.unlink();
        self.leave();
        removed
    }

    fn unlink(&self) -> Result<(), StateError> {
        // Whoever removed it first may have made room for another sandbox of the same id.
        if !is_same(&self.path, self.lock.as_fd()) {
            return Ok(());
        }
        let deadline = Instant::now() + DYING_TIME;
        loop {
            match fs::remove_dir_all(&self.path) {
                Err(error)
                    if error.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < deadline =>
                {
                    std::thread::sleep(SWEEP_TIME);
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StateError::Remove { path: self.path.clone(), error });
                }
                _ => break,
            }
        }
        self.path.parent().into_iter().for_each(leave_root);
        Ok(())
    }

    /// Removes what a dead sandbox of the same id left.
    fn empty(&self) -> Result<(), StateError> {
        self.empty_but(None)
    }

    /// Removes everything in the directory but one file.
    fn empty_but(&self, kept: Option<&str>) -> Result<(), StateError> {
        let error = |error| StateError::Remove { path: self.path.clone(), error };
        for entry in fs::read_dir(&self.path).map_err(error)? {
            let entry = entry.map_err(error)?;
            if kept.is_some_and(|kept| entry.file_name() == kept) {
                continue;
            }
            match entry.file_type().map_err(error)?.is_dir() {
                true => fs::remove_dir_all(entry.path()).map_err(error)?,
                false => fs::remove_file(entry.path()).map_err(error)?,
            }
        }
        Ok(())
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        let _ = match self.at_end {
            AtEnd::Remove => self.unlink(),
            AtEnd::KeepRecord if is_same(&self.path, self.lock.as_fd()) => self.empty_but(Some(RECORD)),
            AtEnd::KeepRecord | AtEnd::Leave => Ok(()),
        };
    }
}

/// The names in a sandbox's directory.
#[derive(Clone, Copy, Debug)]
pub struct StateDirPaths<'a>(pub &'a Path);

impl StateDirPaths<'_> {
    /// The record.
    pub fn record(self) -> PathBuf {
        self.0.join(RECORD)
    }

    /// Where the monitor takes requests of other commands.
    pub fn monitor_socket(self) -> PathBuf {
        self.0.join(MONITOR_SOCKET)
    }

    /// The machine's control socket.
    pub fn vmm_socket(self) -> PathBuf {
        self.0.join(VMM_SOCKET)
    }

    /// The directory of the vsock sockets, which the machine's process sees and so holds nothing else.
    pub fn vsock_directory(self) -> PathBuf {
        self.0.join(VSOCK)
    }

    /// The machine's vsock socket.
    pub fn vsock_socket(self) -> PathBuf {
        self.vsock_directory().join("v")
    }

    /// Where the agent's control connection arrives.
    pub fn agent_socket(self) -> PathBuf {
        self.vsock_directory().join(format!("v_{}", sandbox_protocol::CONTROL_PORT))
    }

    /// Where the agent's stream connections arrive.
    pub fn stream_socket(self) -> PathBuf {
        self.vsock_directory().join(format!("v_{}", sandbox_protocol::STREAM_PORT))
    }
}

/// Whether a live owner has a directory. Asking disturbs nobody but a claim made at the same moment, which is
/// why those who remove try more than once.
pub fn is_owned(path: &Path) -> Result<bool, StateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let error = |error: rustix::io::Errno| StateError::Lock { path: path.into(), error: error.into() };
    let directory = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(rustix::io::Errno::NOENT) => return Ok(false),
        Err(e) => return Err(error(e)),
    };
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(e) => Err(error(e)),
    }
}

/// The process that holds a directory, by the kernel's table of locks (proc_locks(5)).
pub fn owner(path: &Path) -> io::Result<u32> {
    let metadata = fs::metadata(path)?;
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let inode = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = fs::read_to_string("/proc/locks")?;
    let held = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, "WRITE", pid, locked, ..] if locked == inode => pid.parse().ok(),
            _ => None,
        }
    };
    locks.lines().find_map(held).ok_or_else(|| io::ErrorKind::NotFound.into())
}

enum Locked {
    Ours(OwnedFd),
    Theirs,
    Gone,
}

fn try_lock(path: &Path) -> Result<Locked, StateError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(lock) => lock,
        Err(rustix::io::Errno::NOENT) => return Ok(Locked::Gone),
        Err(error) => return Err(StateError::Lock { path: path.into(), error: error.into() }),
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) if is_same(path, lock.as_fd()) => Ok(Locked::Ours(lock)),
        Ok(()) => Ok(Locked::Gone),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Locked::Theirs),
        Err(error) => Err(StateError::Lock { path: path.into(), error: error.into() }),
    }
}

/// Whether a directory was made by us, and holds nothing else than what we put there.
fn is_ours(path: &Path, directory: BorrowedFd<'_>) -> bool {
    const NAMES: [&str; 5] = [RECORD, NEW_RECORD, MONITOR_SOCKET, VMM_SOCKET, VSOCK];
    // Of a machine that was killed while it started.
    let links = [VSOCK_LINK, SHARE_LINK].map(|link| Path::new(VMM_SOCKET).with_extension(link));
    let ours = |name: &OsStr| NAMES.iter().any(|ours| name == *ours) || links.iter().any(|link| link == name);
    let marked = rustix::fs::fstat(directory)
        .is_ok_and(|s| s.st_mode & 0o7777 == MODE && s.st_uid == rustix::process::geteuid().as_raw());
    let known = |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| ours(&entry.file_name()));
    marked && fs::read_dir(path).is_ok_and(|mut entries| entries.all(known))
}

/// Whether a path still leads to the directory that a descriptor is of.
fn is_same(path: &Path, directory: BorrowedFd<'_>) -> bool {
    match (fs::symlink_metadata(path), rustix::fs::fstat(directory)) {
        (Ok(named), Ok(held)) => (named.dev(), named.ino()) == (held.st_dev, held.st_ino),
        _ => false,
    }
}

fn make_root(root: &Path) -> Result<(), StateError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(|error| StateError::Make { path: root.into(), error })
}

/// Removes the root of a namespace if nothing is in it any more.
fn leave_root(root: &Path) {
    let is_namespace =
        root.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NAMESPACE_MARK));
    let is_empty = || fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_none());
    let deadline = Instant::now() + LEAVE_TIME;
    while is_namespace && is_empty() && Instant::now() < deadline {
        match try_lock(root) {
            Ok(Locked::Ours(_lock)) => {
                // It may not be empty any more.
                let _ = fs::remove_dir(root);
                return;
            }
            Ok(Locked::Theirs) => std::thread::sleep(SWEEP_TIME),
            Ok(Locked::Gone) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Status, find, list, remove_if_dead, sweep};
    use super::*;

    fn id(text: &str) -> SandboxId {
        text.parse().unwrap()
    }

    fn record(text: &str) -> Record {
        Record::for_tests(text)
    }

    /// What a killed monitor leaves.
    fn leave_behind(root: &Path, text: &str) {
        let directory = StateDir::claim(root, &id(text)).unwrap();
        directory.write(&record(text)).unwrap();
        fs::create_dir(directory.paths().vsock_directory()).unwrap();
        for of_machine in ["vmm.sock", "vmm.vsock", "vmm.share"] {
            fs::write(directory.path.join(of_machine), "").unwrap();
        }
        let path = directory.path.clone();
        let kept = path.with_extension("kept");
        fs::rename(&path, &kept).unwrap();
        drop(directory);
        fs::rename(&kept, &path).unwrap();
    }

    #[test]
    fn the_last_of_a_namespace_removes_its_root() {
        let above = tempfile::tempdir().unwrap();
        let root = above.path().join("@namespace");
        let (first, second) =
            (StateDir::claim(&root, &id("a")).unwrap(), StateDir::claim(&root, &id("b")).unwrap());
        drop(first);
        assert!(root.exists());
        drop(second);
        assert!(!root.exists());
        let plain = above.path().join("plain");
        drop(StateDir::claim(&plain, &id("a")).unwrap());
        assert!(plain.exists());
    }

    #[test]
    fn one_id_has_one_owner_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let first = StateDir::claim(root.path(), &id("a")).unwrap();
        assert!(matches!(StateDir::claim(root.path(), &id("a")), Err(StateError::InUse { .. })));
        first.remove().unwrap();
        drop(StateDir::claim(root.path(), &id("a")).unwrap());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_dead_are_replaced_and_swept() {
        let root = tempfile::tempdir().unwrap();
        leave_behind(root.path(), "dead");
        let directory = StateDir::claim(root.path(), &id("dead")).unwrap();
        assert_eq!(fs::read_dir(&directory.path).unwrap().count(), 0);
        drop(directory);
        for text in ["dead", "dead-too"] {
            leave_behind(root.path(), text);
        }
        remove_if_dead(&root.path().join("dead")).unwrap();
        assert!(!root.path().join("dead").exists());
        sweep(root.path()).unwrap();
        assert!(!root.path().join("dead-too").exists());
    }

    #[test]
    fn the_living_are_listed_and_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let living = ["b", "a"].map(|text| {
            let directory = StateDir::claim(root.path(), &id(text)).unwrap();
            directory.write(&record(text)).unwrap();
            directory
        });
        leave_behind(root.path(), "dead");
        assert_eq!(list(root.path()).unwrap().0, ["a", "b"].map(record));
        assert_eq!(find(root.path(), &id("a")).unwrap(), (root.path().join("a"), record("a")));
        assert!(matches!(find(root.path(), &id("dead")), Err(StateError::NotFound { .. })));
        drop(living);
    }

    #[test]
    fn what_is_kept_stays_until_it_is_removed_and_has_stopped() {
        let root = tempfile::tempdir().unwrap();
        let mut directory = StateDir::claim(root.path(), &id("a")).unwrap();
        fs::create_dir(directory.paths().vsock_directory()).unwrap();
        directory.keep();
        directory.write(&Record { kept: true, ..record("a") }).unwrap();
        assert!(is_owned(&root.path().join("a")).unwrap());
        assert_eq!(owner(&root.path().join("a")).unwrap(), std::process::id());
        drop(directory);
        assert!(owner(&root.path().join("a")).is_err());
        sweep(root.path()).unwrap();
        let (path, found) = find(root.path(), &id("a")).unwrap();
        assert_eq!((found.status, found.pid), (Status::Stopped, 0));
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        assert!(matches!(StateDir::claim(root.path(), &id("a")), Err(StateError::InUse { .. })));
        StateDir::stale(&path).unwrap().unwrap().remove().unwrap();
        assert!(matches!(find(root.path(), &id("a")), Err(StateError::NotFound { .. })));
    }

    #[test]
    fn a_damaged_record_is_said_and_left_to_whoever_deletes_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        let other = serde_json::to_string(&record("b")).unwrap();
        for text in ["", "{", "[]", &other] {
            leave_behind(root.path(), "a");
            fs::write(path.join(RECORD), text).unwrap();
            sweep(root.path()).unwrap();
            assert!(matches!(find(root.path(), &id("a")), Err(StateError::Damaged { .. })), "{text}");
            let (records, errors) = list(root.path()).unwrap();
            assert!(records.is_empty() && matches!(&errors[..], [StateError::Damaged { .. }]), "{text}");
            assert!(errors[0].to_string().contains("delete --force a"), "{}", errors[0]);
            assert!(matches!(StateDir::claim(root.path(), &id("a")), Err(StateError::InUse { .. })));
            StateDir::stale(&path).unwrap().unwrap().remove().unwrap();
        }
    }

    #[test]
    fn a_directory_of_somebody_else_is_neither_taken_nor_removed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("documents");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("letter"), "").unwrap();
        sweep(root.path()).unwrap();
        assert!(matches!(StateDir::claim(root.path(), &id("documents")), Err(StateError::Foreign { .. })));
        assert!(path.join("letter").exists());
        let path = root.path().join("marked");
        DirBuilder::new().mode(MODE).create(&path).unwrap();
        fs::write(path.join("vmm.letter"), "").unwrap();
        sweep(root.path()).unwrap();
        assert!(matches!(StateDir::claim(root.path(), &id("marked")), Err(StateError::Foreign { .. })));
        assert!(path.join("vmm.letter").exists());
    }

    #[test]
    fn an_owner_removes_its_own_directory_and_not_its_successor_s() {
        let root = tempfile::tempdir().unwrap();
        let first = StateDir::claim(root.path(), &id("a")).unwrap();
        fs::remove_dir_all(root.path().join("a")).unwrap();
        let second = StateDir::claim(root.path(), &id("a")).unwrap();
        first.remove().unwrap();
        assert!(second.path.exists());
    }
}
