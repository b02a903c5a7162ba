//! Id-mapped mounts: files that belong to other ids for the guest than they do on the host.
//!
//! The runtime needs them for files that are added to a machine that runs, `sandbox-vmm` for those that come with it.
//!
//! The kernel takes the mapping from a user namespace (`mount_setattr(2)`). One is made for it by a child that does
//! nothing else and is gone at once. The guest could not map the share's mounts itself: to its kernel every entry is a
//! mount below the share (`announce_submounts`), and Linux 6.12 maps the ids of the topmost FUSE mount only.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, WaitOptions};
use sandbox_vmm_api::{IdMap, IdRange};

/// Why ids could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum IdMapError {
    /// There is no user namespace.
    #[error("making a user namespace: {0}")]
    Namespace(#[source] io::Error),
    /// The kernel refused the ranges.
    #[error("the kernel refuses the mapping in {file}: {error}")]
    Ranges {
        /// The file of the user namespace.
        file: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The file system has no such mounts, or the kernel is older than 5.12.
    #[error("its file system does not support id-mapped mounts: leave the mapping out")]
    Unsupported,
    /// The kernel refused the mount.
    #[error("{0}")]
    Mount(#[source] io::Error),
}

/// Gives detached mounts the mapping.
pub fn apply(tree: BorrowedFd<'_>, map: &IdMap) -> Result<(), IdMapError> {
    let namespace = user_namespace(map)?;
    let request = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    let flags = libc::AT_EMPTY_PATH | if map.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads an empty string that is terminated and a structure of the length that it is told, both
    // of which live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP) => Err(IdMapError::Unsupported),
        _ => Err(IdMapError::Mount(error)),
    }
}

/// A user namespace with these maps and nobody in it.
fn user_namespace(map: &IdMap) -> Result<OwnedFd, IdMapError> {
    let child = Child::in_user_namespace().map_err(IdMapError::Namespace)?;
    for (file, ranges) in [("uid_map", &map.uids), ("gid_map", &map.gids)] {
        std::fs::write(child.directory.join(file), lines(ranges))
            .map_err(|error| IdMapError::Ranges { file, error })?;
    }
    File::open(child.directory.join("ns/user")).map(OwnedFd::from).map_err(IdMapError::Namespace)
}

/// What is inside the namespace is on the disk.
fn lines(ranges: &[IdRange]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.on_disk, range.in_guest, range.count)).collect()
}

/// A child that waits to be killed.
struct Child {
    pid: Pid,
    /// Its directory in /proc.
    directory: PathBuf,
}

impl Child {
    fn in_user_namespace() -> io::Result<Self> {
        let flags = libc::CLONE_NEWUSER | libc::CLONE_PIDFD | libc::SIGCHLD;
        let mut pidfd: libc::c_int = -1;
        // SAFETY: without CLONE_VM the child has a copy of all memory. It makes two system calls and no more, so that
        // locks which other threads held do not matter to it. The parent's descriptor goes to a number that lives.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
        match pid {
            0 => wait_to_be_killed(),
            1.. => {
                let pid =
                    i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
                let mut child = Self { pid, directory: PathBuf::new() };
                // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
                child.directory = directory_in_proc(&unsafe { OwnedFd::from_raw_fd(pidfd) })?;
                Ok(child)
            }
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It is our child and not waited for yet, so that the number is its.
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.pid), WaitOptions::empty());
    }
}

/// A process has another number in /proc than its parent knows, where that is in a process id namespace of its own and
/// /proc is the host's. What the kernel says of the descriptor has the one of /proc (pidfd_open(2), fdinfo).
fn directory_in_proc(pidfd: &OwnedFd) -> io::Result<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<u32>().ok());
    let number = number.filter(|&number| number > 0).ok_or_else(|| io::Error::other("it is not in /proc"))?;
    Ok(Path::new("/proc").join(number.to_string()))
}

fn wait_to_be_killed() -> ! {
    // SAFETY: neither call touches memory. The child dies with its parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        // SAFETY: see above.
        unsafe { libc::pause() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_line() {
        let range = |on_disk, in_guest, count| IdRange { on_disk, in_guest, count };
        assert_eq!(lines(&[range(0, 100_000, 10), range(10, 5, 1)]), "0 100000 10\n10 5 1\n");
    }
}
