//! The files of a machine that runs: those of a container that joins it are added, and taken away when it has ended.
//!
//! The machine's process lives in a mount namespace of its own, whose root is a small read-only file system; the
//! guest's share is the directory [`SHARE`] in it. What is added is opened among the host's mounts, by descriptor, and
//! attached inside that namespace by a thread that enters it: so it is never mounted where anybody else could see
//! it, and it goes with the machine, however that ends. Read-only is the host's own mount attribute. The mount
//! points are made through a writable copy of the root's mount that is attached nowhere, so the machine's
//! process itself cannot write there at any time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};
use sandbox_id_map::IdMapError;
use sandbox_vmm_api::ShareEntry;

use crate::mounts::{self, Access, Depth};
use crate::thread;

/// Where the machine's process has the share.
const SHARE: &str = "/share";

/// Why a container's files could not be added.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A source could not be opened.
    #[error("sharing {} with a machine that runs: {error}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Why.
        error: Errno,
    },
    /// The ids of a source's files could not be mapped.
    #[error("mapping the ids of {}: {error}", path.display())]
    IdMap {
        /// The source.
        path: PathBuf,
        /// Why.
        error: IdMapError,
    },
    /// A source is neither a directory nor a regular file.
    #[error("sharing {}: only a directory or a regular file can be shared", .0.display())]
    Kind(PathBuf),
    /// The machine's mounts could not be changed.
    #[error("cannot {step} of the machine's share: {error}")]
    Machine {
        /// What was being done.
        step: &'static str,
        /// Why.
        error: io::Error,
    },
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> ShareError {
    move |error| ShareError::Machine { step, error: error.into() }
}

/// Adds entries to the share of a machine; all of them or none. `machine` is a descriptor of its process.
pub fn add(machine: OwnedFd, entries: &[ShareEntry]) -> Result<(), ShareError> {
    let sources = entries.iter().map(Source::open).collect::<Result<Vec<_>, _>>()?;
    let undone = entries.to_vec();
    inside(machine, move || {
        let share = Share::open()?;
        let added = sources.iter().try_for_each(|source| share.attach(source));
        added.inspect_err(|_| share.remove(&undone))
    })?
}

/// Takes entries away. What the guest still has open of them stays open until it lets go.
pub fn remove(machine: OwnedFd, entries: &[ShareEntry]) -> Result<(), ShareError> {
    let entries = entries.to_vec();
    inside(machine, move || {
        Share::open()?.remove(&entries);
        Ok(())
    })?
}

/// Does something in the mount namespace of a process. A namespace belongs to a thread, which ends afterwards.
fn inside<T: Send + 'static>(
    process: OwnedFd,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ShareError> {
    let enter_and_work = move || {
        // SAFETY: the thread gets file system attributes of its own; no other thread depends on those of this one,
        // and no descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
            .and_then(|()| {
                rustix::thread::move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT)
            })
            .map(|()| work())
    };
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let worker = thread::spawn("share", move || {
        let _ = sender.send(enter_and_work());
    })
    .map_err(at("start a thread for the mounts"))?;
    let done = receiver.recv();
    let _ = worker.join();
    match done {
        Ok(done) => done.map_err(at("enter the mounts")),
        Err(_) => Err(at("enter the mounts")(io::Error::from(io::ErrorKind::BrokenPipe))),
    }
}

/// Something of the host that is attached nowhere yet.
struct Source {
    place: PathBuf,
    is_directory: bool,
    tree: OwnedFd,
}

impl Source {
    fn open(entry: &ShareEntry) -> Result<Self, ShareError> {
        let failed = |error| ShareError::Source { path: entry.source.clone(), error };
        let access = if entry.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let tree = mounts::clone(&entry.source, Depth::Tree, access).map_err(failed)?;
        if let Some(map) = &entry.id_map {
            let failed = |error| ShareError::IdMap { path: entry.source.clone(), error };
            sandbox_id_map::apply(tree.as_fd(), map).map_err(failed)?;
        }
        let is_directory = match FileType::from_raw_mode(rustix::fs::fstat(&tree).map_err(failed)?.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => return Err(ShareError::Kind(entry.source.clone())),
        };
        Ok(Self { place: entry.path.clone(), is_directory, tree })
    }
}

/// The share, as seen from inside.
struct Share {
    /// Where things are attached.
    attached: OwnedFd,
    /// The same directory, where mount points are made.
    writable: OwnedFd,
}

impl Share {
    fn open() -> Result<Self, ShareError> {
        let attached = directory(CWD, Path::new(SHARE)).map_err(at("open the root"))?;
        let writable = mounts::clone_writable(&attached).map_err(at("copy the mount"))?;
        Ok(Self { attached, writable })
    }

    fn attach(&self, source: &Source) -> Result<(), ShareError> {
        self.make_point(source).map_err(at("make a mount point"))?;
        self.try_attach(source).map_err(at("attach an entry"))
    }

    fn try_attach(&self, source: &Source) -> Result<(), Errno> {
        let point = open(&self.attached, &source.place, OFlags::PATH)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&source.tree, "", &point, "", flags)
    }

    fn make_point(&self, source: &Source) -> Result<(), Errno> {
        for parent in ancestors(&source.place) {
            make_directory(&self.writable, parent)?;
        }
        if source.is_directory {
            return make_directory(&self.writable, &source.place);
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.writable, &source.place, flags, Mode::from_raw_mode(0o444)).map(drop)
    }

    /// Takes away what is there of the entries; what is not needs no removal.
    fn remove(&self, entries: &[ShareEntry]) {
        for entry in entries {
            let _ =
                unmount(Path::new(SHARE).join(&entry.path), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            let _ = rustix::fs::unlinkat(&self.writable, &entry.path, AtFlags::REMOVEDIR)
                .or_else(|_| rustix::fs::unlinkat(&self.writable, &entry.path, AtFlags::empty()));
        }
        let mut parents: Vec<_> = entries.iter().flat_map(|entry| ancestors(&entry.path)).collect();
        parents.sort();
        parents.dedup();
        for parent in parents.iter().rev() {
            let _ = rustix::fs::unlinkat(&self.writable, *parent, AtFlags::REMOVEDIR);
        }
    }
}

/// The directories above a relative path, from the top.
fn ancestors(path: &Path) -> Vec<&Path> {
    let mut above: Vec<_> = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect();
    above.reverse();
    above
}

fn make_directory(top: &OwnedFd, path: &Path) -> Result<(), Errno> {
    match rustix::fs::mkdirat(top, path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

fn directory(top: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    open(top, path, OFlags::PATH | OFlags::DIRECTORY)
}

fn open(top: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(top, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}
