//! The root of a container: the shared directory itself, or an overlay that keeps writes in the guest.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Root as OciRoot, Spec};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, chownat, fstat, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sandbox_protocol::RootWrites;

use super::beneath::Root;
use super::mount_options::{Attributes, Bind, propagation};
use super::mounts::{self, MountStepError};
use crate::boot::{LAYER_STAGE, ROOT_STAGE};

/// The root could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The configuration has none.
    #[error("config.json has no root")]
    None,
    /// A propagation that does not exist.
    #[error(
        "linux.rootfsPropagation is {0:?}: it can be private, slave, shared or unbindable, or r and one of them"
    )]
    Propagation(String),
    /// The directory, or the overlay over it, could not be mounted.
    #[error("cannot mount the root {path}: {source}")]
    Mount {
        /// The directory, as the guest sees it.
        path: PathBuf,
        /// Why not.
        source: MountStepError,
    },
    /// A step failed.
    #[error("cannot {step}: {source}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
}

fn step(step: &'static str) -> impl Fn(Errno) -> RootError {
    move |source| RootError::Step { step, source }
}

/// Makes the overlay over a root for a child that is an ordinary user of the guest: only the guest's root may write
/// the attributes in which an overlay keeps its records. It is attached nowhere.
pub fn overlay_for_others(spec: &Spec, writes: RootWrites) -> Result<Option<OwnedFd>, RootError> {
    if writes == RootWrites::Through {
        return Ok(None);
    }
    let root = spec.root().as_ref().ok_or(RootError::None)?;
    let made = overlay(root.path());
    // The overlay has a hold on its layer of its own.
    let cleared = unmount(LAYER_STAGE, UnmountFlags::DETACH);
    let overlay = made.map_err(|source| RootError::Mount { path: root.path().clone(), source })?;
    cleared.map_err(step("clear the stage of the layer"))?;
    Ok(Some(overlay))
}

/// Mounts the root at its stage in this mount namespace; `made_outside` is taken where there is one.
pub fn assemble(spec: &Spec, writes: RootWrites, made_outside: Option<OwnedFd>) -> Result<Root, RootError> {
    let root = spec.root().as_ref().ok_or(RootError::None)?;
    let tree = match (made_outside, writes) {
        (Some(tree), _) => Ok(tree),
        (None, RootWrites::Through) => mounts::clone_tree(root.path(), Bind::Recursive),
        (None, RootWrites::Overlay) => overlay(root.path()),
    }
    .map_err(|source| RootError::Mount { path: root.path().clone(), source })?;
    let stage = open_directory(Path::new(ROOT_STAGE)).map_err(step("open the stage of the root"))?;
    mounts::attach(&tree, stage.as_fd()).map_err(step("attach the root"))?;
    open_directory(Path::new(ROOT_STAGE)).map(Root::new).map_err(step("open the root"))
}

/// An overlay whose writable layer is in the guest's memory, accounted to the container.
fn overlay(lower: &Path) -> Result<OwnedFd, MountStepError> {
    let source_error = |e| MountStepError::Source { path: lower.to_owned(), source: e };
    // Every entry of the share is a mount that the kernel makes when the entry is opened as a directory. An
    // overlay does not open it so, and refuses a directory that is yet to be mounted.
    let opened = open_directory(lower).map_err(source_error)?;
    let memory = mounts::file_system("tmpfs", Some("layer"), &[("mode".into(), Some("700".into()))])?;
    let stage = open_directory(Path::new(LAYER_STAGE)).map_err(MountStepError::Attach)?;
    mounts::attach(&memory, stage.as_fd()).map_err(MountStepError::Attach)?;
    make_layer_like(&opened, &memory).map_err(source_error)?;
    let data = [
        ("lowerdir+", path_text(lower)),
        ("upperdir", format!("{LAYER_STAGE}/upper")),
        ("workdir", format!("{LAYER_STAGE}/work")),
        // A directory of the lower layer can be renamed, as programs expect of a file system.
        ("redirect_dir", "on".to_owned()),
    ];
    let data: Vec<_> = data.into_iter().map(|(key, value)| (key.to_owned(), Some(value))).collect();
    mounts::file_system("overlay", Some("root"), &data)
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The root directory of an overlay has the owner and mode of its upper layer: those of the lower are kept.
fn make_layer_like(lower: &OwnedFd, layer: &OwnedFd) -> rustix::io::Result<()> {
    let like = fstat(lower)?;
    mkdirat(layer, "work", Mode::from(0o700))?;
    mkdirat(layer, "upper", Mode::from(0o700))?;
    chownat(
        layer,
        "upper",
        Some(Uid::from_raw(like.st_uid)),
        Some(Gid::from_raw(like.st_gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    let upper = openat(layer, "upper", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::fchmod(&upper, Mode::from_raw_mode(like.st_mode & 0o7777))
}

/// Makes the root the process's root, and leaves nothing of the guest's own behind.
pub fn enter(spec: &Spec, root: &Root) -> Result<(), RootError> {
    let propagation = match spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_ref()) {
        None => None,
        Some(name) if name.is_empty() => None,
        Some(name) => Some(propagation(name).ok_or_else(|| RootError::Propagation(name.clone()))?),
    };
    rustix::process::fchdir(root).map_err(step("change to the root"))?;
    // With both names the same, the old root ends on top of the new one, where it can be taken away.
    rustix::process::pivot_root(".", ".").map_err(step("make the root the process's root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("unmount the guest's own root"))?;
    rustix::process::chdir("/").map_err(step("change to the root"))?;
    if let Some(propagation) = propagation {
        let root = open_directory(Path::new("/")).map_err(step("open the root"))?;
        mounts::set_propagation(root.as_fd(), propagation)
            .map_err(step("set the propagation of the root"))?;
    }
    if spec.root().as_ref().and_then(OciRoot::readonly).unwrap_or(false) {
        let root = open_directory(Path::new("/")).map_err(step("open the root"))?;
        let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
        mounts::set_attributes(root.as_fd(), read_only, false).map_err(step("make the root read-only"))?;
    }
    Ok(())
}

fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}
