//! Letting go of the files of a container that is gone.
//!
//! The kernel remembers names and inodes of the share for as long as it has memory to spare, and for every inode that
//! it remembers, the host holds a file open: on a volume that was unmounted there, for instance. When the host has taken
//! a container's directory out of the share, one look that the kernel may not answer from memory is enough to have it
//! drop everything below.

use std::path::Path;

use rustix::fs::Mode;
use sandbox_protocol::SHARE_MOUNT;

/// Forgets a directory of the share that is no longer there.
pub fn forget(name: &str) {
    // Making a directory asks the host whether the name is taken, however fresh the memory of it is. That it cannot be
    // made in this place is as certain as that it need not.
    let _ = rustix::fs::mkdir(Path::new(SHARE_MOUNT).join(name), Mode::from_raw_mode(0o700));
}
