//! What QEMU may do to the host.
//!
//! TCG is not made to hold a hostile guest: one that breaks out of it must find nothing. So QEMU runs
//!
//! - as a user without rights (when this process may choose), with no way to gain any;
//! - in a network namespace without a network, and without the host's System V IPC;
//! - in a mount namespace in which everything is read-only;
//! - with no descriptor but those that it needs, all of them open already;
//! - under its own seccomp filter, in which it can neither start programs nor change its identity.

use std::io;

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
        protect_files()?;
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(user, user, user))?;
        check(libc::setresuid(user, user, user))
    }
}

/// Makes every mount read-only, in the process's own namespace.
fn protect_files() -> io::Result<()> {
    let request = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the kernel reads a string that is terminated and a structure of the length that it is told, both
    // of which live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result as i32)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
