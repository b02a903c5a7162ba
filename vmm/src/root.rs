//! A root directory of a process's own: a small tmpfs with what is mounted in it, in place of the host's files.
//!
//! Made of system calls alone: it can be used between fork and exec.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

/// Each mount point in the root is an inode of the tmpfs, and nothing else is in it. Threads without root's rights find
/// their way through it.
const OPTIONS: [(&CStr, &CStr); 3] = [(c"size", c"64k"), (c"nr_inodes", c"16384"), (c"mode", c"0711")];

/// A step that the host's kernel refused.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{step}: {error}")]
pub struct Refused {
    /// What was being done.
    pub step: &'static str,
    /// Why.
    pub error: Errno,
}

/// An error of a step.
pub fn at(step: &'static str) -> impl Fn(Errno) -> Refused {
    move |error| Refused { step, error }
}

/// Lets nothing that is mounted from here on spread to the host. The calling thread has a mount namespace of its own.
pub fn keep_mounts_inside() -> Result<(), Refused> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(at("keeping mounts inside"))
}

/// The new root, attached over the old one, which stays the process's root for now.
pub struct Root(OwnedFd);

impl Root {
    /// Makes it, with nothing in it.
    pub fn new() -> Result<Self, Refused> {
        let failed = at("making the root");
        let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(&failed)?;
        for (key, value) in OPTIONS {
            rustix::mount::fsconfig_set_string(&context, key, value).map_err(&failed)?;
        }
        let root = mount_made(&context, MountAttrFlags::empty()).map_err(&failed)?;
        attach(&root, CWD, c"/").map_err(at("attaching the root"))?;
        Ok(Self(root))
    }

    /// Makes it read-only, so that nobody can fill the host's memory with it, and the root of the process; lets go of
    /// the old one.
    pub fn enter(self) -> Result<(), Refused> {
        set_attributes(self.0.as_fd(), AtFlags::EMPTY_PATH, libc::MOUNT_ATTR_RDONLY)
            .map_err(at("making the root read-only"))?;
        rustix::process::fchdir(&self.0).map_err(at("entering the root"))?;
        // With both names the same, the old root ends up mounted on the new one and can be detached by that name.
        rustix::process::pivot_root(c".", c".").map_err(at("changing to the root"))?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(at("detaching the host's root"))?;
        rustix::process::chdir(c"/").map_err(at("entering the root"))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Mounts a new file system, attached nowhere, without devices, set-user-id and programs.
pub fn mount_made(context: &OwnedFd, more: MountAttrFlags) -> Result<OwnedFd, Errno> {
    rustix::mount::fsconfig_create(context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | more;
    rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A copy of what is mounted at a path and below it, attached nowhere.
pub fn copy_tree(path: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    rustix::mount::open_tree(CWD, path, flags)
}

/// Makes a directory unless it is there, and opens it.
pub fn make_directory(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(&parent, name, flags, Mode::empty())
}

/// Makes an empty file to mount another on, and opens it.
pub fn make_file(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o444))
}

/// Attaches detached mounts.
pub fn attach(tree: &OwnedFd, at: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if name.is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    rustix::mount::move_mount(tree, c"", at, name, flags)
}

/// Gives all of detached mounts these attributes, and takes their spreading.
pub fn protect_tree(tree: BorrowedFd<'_>, attributes: u64) -> Result<(), Errno> {
    set_attributes(
        tree,
        AtFlags::EMPTY_PATH | AtFlags::from_bits_retain(libc::AT_RECURSIVE as u32),
        attributes,
    )
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
