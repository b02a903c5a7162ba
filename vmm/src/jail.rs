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

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::thread::UnshareFlags;
use sandbox_id_map::IdMapError;
use sandbox_vmm_api::ShareEntry;

use crate::fs::Access;

/// Where the jail has the share.
pub const SHARE: &str = "/share";

/// Where the jail has the directory of the vsock sockets.
pub const VSOCK: &str = "/vsock";

/// Each mount point in the root is an inode of the tmpfs, and nothing else is in it. Threads without root's rights find
/// their way through it.
const ROOT_OPTIONS: [(&str, &str); 3] = [("size", "64k"), ("nr_inodes", "16384"), ("mode", "0711")];

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
    #[error("{step} of the machine's jail: {error}")]
    Root {
        /// What was being done.
        step: &'static str,
        /// Why.
        error: Errno,
    },
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

    let root = mount_root()?;
    let share = make_directory(&root, c"share").map_err(at("making the share directory"))?;
    for source in &sources {
        source.mount_in(&share)?;
    }
    if let Some(vsock) = vsock {
        vsock.mount_in(&root)?;
    }
    protect_root(&root)?;
    change_root(&root)?;
    rustix::thread::set_no_new_privs(true).map_err(at("giving up new privileges"))
}

/// An error of a step on the root.
fn at(step: &'static str) -> impl Fn(Errno) -> Error {
    move |error| Error::Root { step, error }
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
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(at("keeping mounts inside"))
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
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(CWD, path, flags).map_err(failed)?;
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
    fn mount_in(&self, top: &OwnedFd) -> Result<(), Error> {
        self.try_mount_in(top).map_err(|error| Error::Place {
            source_path: self.path.clone(),
            place: self.place.clone(),
            error,
        })
    }

    fn try_mount_in(&self, top: &OwnedFd) -> Result<(), Errno> {
        let mut names = Vec::new();
        for part in &self.place {
            names.push(CString::new(part.as_encoded_bytes()).map_err(|_| Errno::INVAL)?);
        }
        let last = names.pop().ok_or(Errno::INVAL)?;
        let mut parent = rustix::io::fcntl_dupfd_cloexec(top, 0)?;
        for name in &names {
            parent = make_directory(&parent, name)?;
        }
        let point = match self.kind {
            SourceKind::Directory => make_directory(&parent, &last)?,
            SourceKind::File => make_file(&parent, &last)?,
        };
        attach(&self.tree, point.as_fd(), c"")
    }
}

/// Makes a directory unless it is there, and opens it.
fn make_directory(parent: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Makes an empty file to mount another on, and opens it.
fn make_file(parent: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o444))
}

/// Attaches detached mounts.
fn attach(tree: &OwnedFd, at: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if name.is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    rustix::mount::move_mount(tree, c"", at, name, flags)
}

/// Makes the new root and attaches it over the old one, which stays the process's root for now.
fn mount_root() -> Result<OwnedFd, Error> {
    let failed = at("making the root");
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(&failed)?;
    for (key, value) in ROOT_OPTIONS {
        rustix::mount::fsconfig_set_string(&context, key, value).map_err(&failed)?;
    }
    rustix::mount::fsconfig_create(&context).map_err(&failed)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root =
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(&failed)?;
    attach(&root, CWD, c"/").map_err(at("attaching the root"))?;
    Ok(root)
}

/// Nothing can be made in the root any more: a guest could fill the host's memory with it.
fn protect_root(root: &OwnedFd) -> Result<(), Error> {
    set_attributes(root.as_fd(), AtFlags::EMPTY_PATH, libc::MOUNT_ATTR_RDONLY)
        .map_err(at("making the root read-only"))
}

/// Makes `root` the root of the process and lets go of the old one.
fn change_root(root: &OwnedFd) -> Result<(), Error> {
    rustix::process::fchdir(root).map_err(at("entering the root"))?;
    // With both names the same, the old root ends up mounted on the new one and can be detached by that name.
    rustix::process::pivot_root(".", ".").map_err(at("changing to the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(at("detaching the host's root"))?;
    rustix::process::chdir("/").map_err(at("entering the root"))
}

/// Takes devices, set-user-id and execution from detached mounts, writing too if asked, and their spreading.
fn protect_tree(tree: BorrowedFd<'_>, access: Access) -> Result<(), Errno> {
    let always = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let set = match access {
        Access::ReadOnly => always | libc::MOUNT_ATTR_RDONLY,
        Access::ReadWrite => always,
    };
    set_attributes(tree, AtFlags::EMPTY_PATH | AtFlags::from_bits_retain(libc::AT_RECURSIVE as u32), set)
}

fn set_attributes(mount: BorrowedFd<'_>, flags: AtFlags, attributes: u64) -> Result<(), Errno> {
    let request =
        libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    // SAFETY: the kernel reads an empty string that is terminated and a structure of the length that it is
    // told, both of which live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags.bits(),
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
#[path = "jail_tests.rs"]
mod tests;
