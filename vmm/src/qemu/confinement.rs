//! What QEMU may do to the host.
//!
//! TCG is not made to hold a hostile guest: one that breaks out of it must find nothing. So QEMU runs
//!
//! - as a user without rights (when this process may choose), with no way to gain any;
//! - in a network namespace without a network, and without the host's System V IPC;
//! - in a root directory that holds the host's programs, read-only, and the processes of its own namespace, of which it
//!   sees itself;
//! - with no descriptor but those that it needs, all of them open already;
//! - under its own seccomp filter, in which it can neither start programs nor change its identity.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountAttrFlags};

use crate::root::{self, Refused, Root, at};

/// Where QEMU, its modules, its firmware and its libraries are. What is no directory of the host is left out.
const PROGRAMS: [(&CStr, &CStr); 5] =
    [(c"/usr", c"usr"), (c"/bin", c"bin"), (c"/lib", c"lib"), (c"/lib32", c"lib32"), (c"/lib64", c"lib64")];

/// Where the libraries are listed, below `/etc`, of which there is nothing else.
const LIBRARIES: (&CStr, &CStr) = (c"/etc/ld.so.cache", c"ld.so.cache");

/// `nobody` and `nogroup`, where QEMU has no ids of its own.
pub const NOBODY: u32 = 65534;

/// Confines the process, which becomes this user's. Called between fork and exec, it makes system calls and nothing else.
pub fn enter(user: u32) -> io::Result<()> {
    // SAFETY: system calls on integers.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        if libc::geteuid() != 0 {
            // The kernel holds it to what the caller may do.
            return Ok(());
        }
        check(libc::unshare(
            libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS,
        ))?;
        leave_files().map_err(|refused| io::Error::from(refused.error))?;
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(user, user, user))?;
        check(libc::setresuid(user, user, user))
    }
}

/// Leaves the host's files but for those that it takes to be a program.
fn leave_files() -> Result<(), Refused> {
    root::keep_mounts_inside()?;
    let new = Root::new()?;
    for (path, name) in PROGRAMS {
        if let Some(tree) = programs_at(path).map_err(at("finding programs"))? {
            let place = root::make_directory(&new, name).map_err(at("making a directory"))?;
            root::attach(&tree, place.as_fd(), c"").map_err(at("mounting programs"))?;
        }
    }
    let (path, name) = LIBRARIES;
    if let Some(tree) = programs_at(path).map_err(at("finding the list of libraries"))? {
        let place = root::make_directory(&new, c"etc")
            .and_then(|parent| root::make_file(&parent, name))
            .map_err(at("making a file"))?;
        root::attach(&tree, place.as_fd(), c"").map_err(at("mounting the list of libraries"))?;
    }
    mount_processes(&new).map_err(at("mounting /proc"))?;
    new.enter()
}

/// What the host has there, to be read and executed.
fn programs_at(path: &CStr) -> Result<Option<OwnedFd>, Errno> {
    let tree = match root::copy_tree(path) {
        Err(Errno::NOENT) => return Ok(None),
        tree => tree?,
    };
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    root::protect_tree(tree.as_fd(), attributes)?;
    Ok(Some(tree))
}

/// Mounts a `/proc`: descriptors have their names there.
fn mount_processes(new: &Root) -> Result<(), Errno> {
    let tree = match own_processes() {
        // In a user namespace whose `/proc` is covered in part, there is no other to be had.
        Err(Errno::PERM) => programs_at(c"/proc")?.ok_or(Errno::NOENT)?,
        tree => tree?,
    };
    let place = root::make_directory(new, c"proc")?;
    root::attach(&tree, place.as_fd(), c"")
}

/// A `/proc` of which a process without rights sees itself.
fn own_processes() -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [(c"subset", c"pid"), (c"hidepid", c"invisible")] {
        rustix::mount::fsconfig_set_string(&context, key, value)?;
    }
    root::mount_made(&context, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
