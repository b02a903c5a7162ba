//! Paths that a container must not read, or not write.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Linux;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::beneath::{BeneathError, Kind, Root};
use super::mount_options::{Attributes, Bind};
use super::mounts::{self, MountStepError};

/// A path could not be hidden.
#[derive(Debug, thiserror::Error)]
pub enum HiddenError {
    /// It could not be resolved.
    #[error(transparent)]
    Path(#[from] BeneathError),
    /// It could not be made read-only.
    #[error("cannot make {path} of linux.readonlyPaths read-only: {source}")]
    ReadOnly {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// It could not be covered.
    #[error("cannot cover {path} of linux.maskedPaths: {source}")]
    Mask {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: MountStepError,
    },
}

const READ_ONLY: Attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };

/// Makes the read-only paths read-only and covers the masked ones; those that do not exist need neither.
pub fn hide(linux: &Linux, root: &Root) -> Result<(), HiddenError> {
    for path in linux.readonly_paths().iter().flatten().map(Path::new) {
        if let Some(target) = root.look(path)? {
            make_read_only(&target)
                .map_err(|source| HiddenError::ReadOnly { path: path.to_owned(), source })?;
        }
    }
    for path in linux.masked_paths().iter().flatten().map(Path::new) {
        if let Some(target) = root.look(path)? {
            cover(&target).map_err(|source| HiddenError::Mask { path: path.to_owned(), source })?;
        }
    }
    Ok(())
}

fn make_read_only(target: &OwnedFd) -> rustix::io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(target, "", flags)?;
    mounts::set_attributes(tree.as_fd(), READ_ONLY, true)?;
    mounts::attach(&tree, target.as_fd())
}

/// A directory is covered by an empty one, a file by the guest's own `/dev/null`: that of the container's root
/// might be something else.
fn cover(target: &OwnedFd) -> Result<(), MountStepError> {
    let tree = match Kind::of(target).map_err(MountStepError::Attach)? {
        Kind::Directory => {
            let empty =
                mounts::file_system("tmpfs", Some("masked"), &[("nr_inodes".into(), Some("1".into()))])?;
            mounts::set_attributes(empty.as_fd(), READ_ONLY, false).map_err(MountStepError::Attributes)?;
            empty
        }
        Kind::File => mounts::clone_tree(Path::new("/dev/null"), Bind::Single)?,
    };
    mounts::attach(&tree, target.as_fd()).map_err(MountStepError::Attach)
}
