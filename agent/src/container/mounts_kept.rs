//! The mounts of a container, kept until nothing is under way on them.
//!
//! A process may end while the kernel still reads ahead in a file of the share for it. With the last process goes the
//! mount namespace, with that the mounts, and with a mount its file system, for each mount of the host is one to the
//! guest (`fuse_dentry_automount` of Linux). The kernel does not wait for what it has asked of such a one (6.12,
//! `virtio_kill_sb`): an answer that comes later finds an inode that is no more, and the kernel panics. So the agent
//! holds the namespace, and lets go of it when the share has answered what it was asked before.

use std::fs::File;

use rustix::process::Pid;
use sandbox_protocol::SHARE_MOUNT;

/// The mount namespace of a container.
#[derive(Debug)]
pub struct KeptMounts {
    _namespace: File,
}

impl KeptMounts {
    /// That of a process, if it still has one.
    pub fn of(process: Pid) -> Option<Self> {
        let namespace = File::open(format!("/proc/{}/ns/mnt", process.as_raw_nonzero())).ok()?;
        Some(Self { _namespace: namespace })
    }
}

impl Drop for KeptMounts {
    fn drop(&mut self) {
        // Answers come in the order of the questions. With the answer to a read, the kernel closes the file if nobody
        // else has it open, which is a question of its own: hence twice.
        for _ in 0..2 {
            let _ = rustix::fs::statfs(SHARE_MOUNT);
        }
    }
}
