//! The jail: what the process that runs a guest still sees of the host's files. It also has a network without an
//! interface, and IPC and names of its own.
//!
//! ```text
//! /            a small tmpfs of its own, read-only
//! ├─ share/    the share's entries, each a bind mount of its source with all that is mounted below it
//! └─ vsock/    the directory of the vsock device's unix sockets
//! ```
//!
//! Everything else is opened before. The mounts exist in a mount namespace of the process, so nobody else sees
//! them and they go when it ends, however it ends. Sources are handled by descriptor from the moment they are
//! opened, so a path in a directory that somebody else writes to is resolved once and never again. A read-only
//! entry is made read-only by the host's kernel, for itself and for every mount below it, whatever the guest
//! asks for.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use sandbox_id_map::IdMapError;
use sandbox_vmm_api::ShareEntry;

use crate::fs::Access;
use crate::root::{self, Refused, Root, at};

/// Where the jail has the share.
pub const SHARE: &str = "/share";

/// Where the jail has the directory of the vsock sockets.
pub const VSOCK: &str = "/vsock";

/// Why the jail could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Namespaces belong to a thread.
    #[error("the jail must be entered before any thread is started")]
    Threads,
    /// The namespaces were refused.
    #[error("making namespaces for the machine: {0}{remedy}", remedy = privilege_remedy(*.0))]
    Namespaces(Errno),
    /// A source could not be opened.
    #[error("sharing {path}: {error}", path = .path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Why.
        error: Errno,
    },
    /// A source is neither a directory nor a regular file.
    #[error("sharing {path}: only a directory or a regular file can be shared", path = .0.display())]
    SourceType(PathBuf),
    /// A source could not be protected against writes.
    #[error("making the share of {path} {access}: {error}", path = .path.display())]
    Protect {
        /// The source.
        path: PathBuf,
        /// What it was to be.
        access: &'static str,
        /// Why.
        error: Errno,
    },
    /// The ids of a source's files could not be mapped.
    #[error("mapping the ids of {path}: {error}", path = .path.display())]
    IdMap {
        /// The source.
        path: PathBuf,
        /// Why.
        error: IdMapError,
    },
    /// A source could not be mounted at its place.
    #[error("mounting {source_path} at {place} of the share: {error}",
        source_path = .source_path.display(), place = .place.display())]
    Place {
        /// The source.
        source_path: PathBuf,
        /// Its place in the share.
        place: PathBuf,
        /// Why.
        error: Errno,
    },
    /// The root could not be made or changed to.
    #[error("{} of the machine's jail: {}", .0.step, .0.error)]
    Root(#[from] Refused),
}

fn privilege_remedy(error: Errno) -> &'static str {
    if error == Errno::PERM { ": run it as root (it needs CAP_SYS_ADMIN)" } else { "" }
}

/// Namespaces for the process alone: a network without an interface, System V IPC, and names. Sockets with abstract
/// names are of a network namespace, and need no file to be reached.
///
/// To make a network is the longest step of a jail. Namespaces are a thread's, so another thread can make these
/// meanwhile.
pub struct Apart([OwnedFd; 3]);

impl Apart {
    /// Makes them, for the calling thread and for who enters the jail.
    pub fn make() -> Result<Self, Error> {
        let kinds = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        // SAFETY: no memory and no descriptor is of a namespace of these kinds.
        unsafe { rustix::thread::unshare_unsafe(kinds) }.map_err(Error::Namespaces)?;
        let open = |name| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(name, flags, Mode::empty()).map_err(at("opening the namespaces"))
        };
        Ok(Self([
            open("/proc/thread-self/ns/net")?,
            open("/proc/thread-self/ns/ipc")?,
            open("/proc/thread-self/ns/uts")?,
        ]))
    }

    fn enter(&self) -> Result<(), Error> {
        self.0.iter().try_for_each(|namespace| {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), None).map_err(Error::Namespaces)
        })
    }
}

/// Moves the process into its jail. It must have no other thread any more.
///
/// Afterwards every path that the process names is one of the jail: [`SHARE`] holds `shares`, [`VSOCK`] is
/// `vsock_directory`. Programs that it executes gain no privileges.
pub fn enter(shares: &[ShareEntry], vsock_directory: Option<&Path>, apart: &Apart) -> Result<(), Error> {
    check_single_thread()?;
    apart.enter()?;
    leave_mounts()?;
    let sources = shares.iter().map(Source::of_share).collect::<Result<Vec<_>, _>>()?;
    let vsock = vsock_directory.map(Source::of_vsock).transpose()?;

    let root = Root::new()?;
    let share = root::make_directory(&root, c"share").map_err(at("making the share directory"))?;
    for source in &sources {
        source.mount_in(share.as_fd())?;
    }
    if let Some(vsock) = vsock {
        vsock.mount_in(root.as_fd())?;
    }
    root.enter()?;
    Ok(rustix::thread::set_no_new_privs(true).map_err(at("giving up new privileges"))?)
}

/// How long a thread that has been joined may still be counted: the kernel says that it has ended a moment
/// before it takes it off the list.
const JOINED_THREAD_TIME: Duration = Duration::from_secs(1);

/// The links of the directory of a process's threads, if there is one.
const ONE_THREAD: u64 = 3;

fn check_single_thread() -> Result<(), Error> {
    let deadline = Instant::now() + JOINED_THREAD_TIME;
    loop {
        // Itself, its parent and one for each thread. Without /proc nothing can be counted, and the caller's word has
        // to do.
        let links = std::fs::metadata("/proc/self/task").map_or(ONE_THREAD, |directory| directory.nlink());
        if links == ONE_THREAD {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::Threads);
        }
        std::thread::yield_now();
    }
}

/// Leaves the host's mount namespace for a copy in which nothing spreads to the host.
fn leave_mounts() -> Result<(), Error> {
    // SAFETY: no thread shares this one's file system attributes, as was checked before.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(Error::Namespaces)?;
    Ok(root::keep_mounts_inside()?)
}

/// Something of the host that the jail shows: a copy of its mounts that is attached nowhere yet.
struct Source {
    path: PathBuf,
    place: PathBuf,
    kind: SourceKind,
    tree: OwnedFd,
}

/// What a mount point for a source must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SourceKind {
    Directory,
    File,
}

impl Source {
    fn of_share(entry: &ShareEntry) -> Result<Self, Error> {
        let access = if entry.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let source = Self::open(&entry.source, &entry.path, access)?;
        if let Some(map) = &entry.id_map {
            let failed = |error| Error::IdMap { path: entry.source.clone(), error };
            sandbox_id_map::apply(source.tree.as_fd(), map).map_err(failed)?;
        }
        Ok(source)
    }

    /// Sockets can be connected to on a read-only mount.
    fn of_vsock(directory: &Path) -> Result<Self, Error> {
        Self::open(directory, Path::new("vsock"), Access::ReadOnly)
    }

    fn open(path: &Path, place: &Path, access: Access) -> Result<Self, Error> {
        let failed = |error| Error::Source { path: path.to_owned(), error };
        let tree = root::copy_tree(path).map_err(failed)?;
        let kind = match FileType::from_raw_mode(rustix::fs::fstat(&tree).map_err(failed)?.st_mode) {
            FileType::Directory => SourceKind::Directory,
            FileType::RegularFile => SourceKind::File,
            _ => return Err(Error::SourceType(path.to_owned())),
        };
        protect_tree(tree.as_fd(), access).map_err(|error| Error::Protect {
            path: path.to_owned(),
            access: match access {
                Access::ReadOnly => "read-only",
                Access::ReadWrite => "free of devices",
            },
            error,
        })?;
        Ok(Self { path: path.to_owned(), place: place.to_owned(), kind, tree })
    }

    /// Attaches the mounts at their place below `top`.
    fn mount_in(&self, top: BorrowedFd<'_>) -> Result<(), Error> {
        self.try_mount_in(top).map_err(|error| Error::Place {
            source_path: self.path.clone(),
            place: self.place.clone(),
            error,
        })
    }

    fn try_mount_in(&self, top: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut names = Vec::new();
        for part in &self.place {
            names.push(CString::new(part.as_encoded_bytes()).map_err(|_| Errno::INVAL)?);
        }
        let last = names.pop().ok_or(Errno::INVAL)?;
        let mut parent = rustix::io::fcntl_dupfd_cloexec(top, 0)?;
        for name in &names {
            parent = root::make_directory(&parent, name)?;
        }
        let point = match self.kind {
            SourceKind::Directory => root::make_directory(&parent, &last)?,
            SourceKind::File => root::make_file(&parent, &last)?,
        };
        root::attach(&self.tree, point.as_fd(), c"")
    }
}

/// Takes devices, set-user-id and execution from detached mounts, writing too if asked, and their spreading.
fn protect_tree(tree: BorrowedFd<'_>, access: Access) -> Result<(), Errno> {
    let always = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    root::protect_tree(
        tree,
        match access {
            Access::ReadOnly => always | libc::MOUNT_ATTR_RDONLY,
            Access::ReadWrite => always,
        },
    )
}

#[cfg(test)]
#[path = "jail_tests.rs"]
mod tests;
