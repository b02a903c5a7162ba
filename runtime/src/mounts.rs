//! Mounts of the host by descriptor: copies of trees, and their attributes.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

/// How much of a tree of mounts is meant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Depth {
    /// The mount alone.
    Mount,
    /// All that is mounted below it, too.
    Tree,
}

/// What a mount allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Reading.
    ReadOnly,
    /// Writing, too.
    ReadWrite,
}

/// A detached copy of what is mounted at a path. Nothing spreads from it or to it, and there are neither devices nor
/// programs in it, as far as the host is concerned.
pub fn clone(source: &Path, depth: Depth, access: Access) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if depth == Depth::Tree {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags)?;
    let always = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let read_only = match access {
        Access::ReadOnly => libc::MOUNT_ATTR_RDONLY,
        Access::ReadWrite => 0,
    };
    set_attributes(&tree, depth, always | read_only, 0)?;
    Ok(tree)
}

/// A detached copy of a mount, which can be written to even where the mount itself cannot.
pub fn clone_writable(mount: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = open_tree(mount, "", flags)?;
    set_attributes(&copy, Depth::Mount, 0, libc::MOUNT_ATTR_RDONLY)?;
    Ok(copy)
}

fn set_attributes(tree: &OwnedFd, depth: Depth, set: u64, clear: u64) -> Result<(), Errno> {
    const EMPTY: &CStr = c"";
    let change =
        libc::mount_attr { attr_set: set, attr_clr: clear, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let recursive = match depth {
        Depth::Mount => 0,
        Depth::Tree => libc::AT_RECURSIVE,
    };
    // SAFETY: the path and the structure are valid and outlive the call, which only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
