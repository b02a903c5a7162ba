//! A container's files as the host has them, in a mount namespace of their own: the root file system, and in it the
//! volumes. Where the guest has a file system of its own, such as `/proc` or a tmpfs, there is an empty directory that
//! nothing can be written to.
//!
//! Two look at it: the process that stands for the container ([`crate::stand_in`]), whose root it becomes, and the
//! hooks of `createContainer` ([`crate::hooks`]), which find it at its place among the host's files. Nothing in it can
//! be executed, is a device or sets a user id: the files are the hostile side's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::thread::UnshareFlags;
use sandbox_protocol::RootWrites;
use sandbox_vmm_api::{IdMap, ShareEntry};
use serde::{Deserialize, Serialize};

use crate::mounts::{self, Access, Depth};
use crate::sandbox::ContainerPlan;
use crate::spec::is_bind;

/// A container's files cannot be shown.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} to show the container's files: {error}")]
pub struct ViewError {
    step: &'static str,
    error: io::Error,
}

fn failed(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> ViewError {
    move |error| ViewError { step, error: error.into() }
}

/// What there is to see of a container's files.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct View {
    root: PathBuf,
    read_only: bool,
    mounts: Vec<Shown>,
}

/// What there is at a place in the container.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Shown {
    destination: PathBuf,
    /// Of the host; none is a file system of the guest's.
    source: Option<PathBuf>,
    read_only: bool,
    id_map: Option<IdMap>,
}

impl View {
    /// That of a container to be, for which the host shares these.
    pub fn of(container: &ContainerPlan, shares: &[ShareEntry]) -> Self {
        let shown = |(index, mount): (usize, &oci_spec::runtime::Mount)| {
            let path = Path::new("mounts").join(index.to_string());
            let share = shares.iter().find(|share| share.path.ends_with(&path));
            Shown {
                destination: mount.destination().clone(),
                source: share.filter(|_| is_bind(mount)).map(|share| share.source.clone()),
                read_only: share.is_none_or(|share| share.read_only),
                id_map: share.and_then(|share| share.id_map.clone()),
            }
        };
        let mounts = container.create.spec.mounts().iter().flatten().enumerate();
        Self {
            root: container.rootfs.clone(),
            // What the container writes to an overlay is not to be seen, and what others write it would not see.
            read_only: container.create.root == RootWrites::Overlay,
            mounts: mounts.map(shown).collect(),
        }
    }

    /// Leaves the host's mounts for these, for good. The process has one thread.
    pub fn enter(&self) -> Result<(), ViewError> {
        self.attach()?;
        rustix::process::chdir(&self.root)
            .and_then(|()| rustix::process::pivot_root(".", "."))
            .and_then(|()| unmount(".", UnmountFlags::DETACH))
            .and_then(|()| rustix::process::chdir("/"))
            .map_err(failed("enter the root file system"))
    }

    /// Gives this thread, and the processes that it starts, a mount namespace of its own in which the root file
    /// system, at its place on the host, has the volumes in it.
    pub fn attach(&self) -> Result<(), ViewError> {
        // SAFETY: this thread gets file system attributes of its own; no other thread depends on those of this one,
        // and no descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
            .map_err(failed("make a mount namespace"))?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .map_err(failed("cut the mount namespace off"))?;
        let root = clone(&self.root, self.read_only).map_err(failed("open the root file system"))?;
        let mounts: Vec<(&Shown, OwnedFd)> = self
            .mounts
            .iter()
            .map(|shown| Ok((shown, tree(shown)?)))
            .collect::<Result<_, _>>()
            .map_err(|error| ViewError { step: "open a volume", error })?;
        move_mount(&root, "", CWD, &self.root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed("attach the root file system"))?;
        for (shown, tree) in &mounts {
            // What is at the place is the guest's affair, who may have put there what nothing can be mounted on.
            let _ = place(root.as_fd(), tree, &shown.destination);
        }
        Ok(())
    }
}

/// A detached copy of a mount of the host.
fn clone(source: &Path, read_only: bool) -> rustix::io::Result<OwnedFd> {
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    mounts::clone(source, Depth::Mount, access)
}

fn tree(shown: &Shown) -> io::Result<OwnedFd> {
    let Some(source) = &shown.source else { return Ok(nothing()?) };
    let tree = clone(source, shown.read_only)?;
    if let Some(map) = &shown.id_map {
        sandbox_id_map::apply(tree.as_fd(), map).map_err(io::Error::other)?;
    }
    Ok(tree)
}

/// An empty directory that stays empty.
fn nothing() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Attaches a tree at a path below a root, which belongs to the hostile side.
fn place(root: BorrowedFd<'_>, tree: &OwnedFd, destination: &Path) -> rustix::io::Result<()> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let target = openat2(root, destination, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}
