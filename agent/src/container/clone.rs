//! `clone3`: a child in new namespaces and in a cgroup, from its first instruction.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

/// The flag that has the child born into a cgroup; libc's constant of this name is cut to 32 bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of the clone this is.
#[derive(Debug)]
pub enum Cloned {
    /// The child.
    Child,
    /// The parent.
    Parent {
        /// The child's pid.
        pid: Pid,
        /// A descriptor of the child.
        pidfd: OwnedFd,
    },
}

/// Clones the process into new namespaces (`CLONE_NEW*` flags) and the cgroup.
///
/// # Safety
///
/// The process has one thread: the child of a process with more may find a lock held by a thread that it does
/// not have.
pub unsafe fn clone_into(namespaces: u64, cgroup: BorrowedFd<'_>) -> io::Result<Cloned> {
    let mut pidfd: i32 = -1;
    // SAFETY: all zero is a valid value of this plain structure.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces | (libc::CLONE_PIDFD as u64) | CLONE_INTO_CGROUP;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: the arguments are valid for the call, and without CLONE_VM the child has a copy of all memory.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<libc::clone_args>()) };
    match pid {
        0 => Ok(Cloned::Child),
        1.. => {
            // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            Ok(Cloned::Parent { pid: pid.ok_or(io::ErrorKind::InvalidData)?, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}
