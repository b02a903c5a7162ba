//! What an engine sees of a container's files when it enters the mount namespace of what stands for the container.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::{StandInError, host};
use crate::mounts::{self, Access, Depth};
use crate::network;
use crate::sandbox::Plan;
use crate::spec::is_bind;

/// What an engine is to see of a container's files.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct View {
    root: PathBuf,
    read_only: bool,
    mounts: Vec<Shown>,
    /// Where engines look for its network.
    pub network: network::Wanted,
}

/// What there is at a place in the container.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Shown {
    destination: PathBuf,
    /// Of the host; none is a file system of the guest's.
    source: Option<PathBuf>,
    read_only: bool,
}

impl View {
    /// That of a container to be.
    pub fn of(plan: &Plan) -> Self {
        let spec = &plan.container.create.spec;
        let shown = |(index, mount): (usize, &oci_spec::runtime::Mount)| {
            let path = Path::new("mounts").join(index.to_string());
            let share = plan.shares().iter().find(|share| share.path.ends_with(&path));
            Shown {
                destination: mount.destination().clone(),
                source: share.filter(|_| is_bind(mount)).map(|share| share.source.clone()),
                read_only: share.is_none_or(|share| share.read_only),
            }
        };
        Self {
            root: plan.container.rootfs.clone(),
            read_only: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
            mounts: spec.mounts().iter().flatten().enumerate().map(shown).collect(),
            network: plan.container.network.clone(),
        }
    }
}

/// Leaves the host's mounts for those of the view.
pub fn take_place(view: &View) -> Result<(), StandInError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(host("open /dev/null"))?;
    // SAFETY: this process has one thread, and no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(host("make a mount namespace"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(host("cut the mount namespace off"))?;
    let root = clone(&view.root, view.read_only).map_err(host("open the root file system"))?;
    let mounts: Vec<(&Shown, OwnedFd)> = view
        .mounts
        .iter()
        .map(|shown| Ok((shown, tree(shown)?)))
        .collect::<Result<_, _>>()
        .map_err(host("open a volume"))?;
    move_mount(&root, "", CWD, &view.root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .and_then(|()| rustix::process::chdir(&view.root))
        .and_then(|()| rustix::process::pivot_root(".", "."))
        .and_then(|()| unmount(".", UnmountFlags::DETACH))
        .and_then(|()| rustix::process::chdir("/"))
        .map_err(host("enter the root file system"))?;
    for (shown, tree) in &mounts {
        // What is at the place is the guest's affair, who may have put there what nothing can be mounted on.
        let _ = attach(tree, &shown.destination);
    }
    // The streams are the monitor's, and whoever reads them waits for the last who has them.
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .map_err(host("let go of the standard streams"))
}

/// A detached copy of a mount of the host.
fn clone(source: &Path, read_only: bool) -> rustix::io::Result<OwnedFd> {
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    mounts::clone(source, Depth::Mount, access)
}

fn tree(shown: &Shown) -> rustix::io::Result<OwnedFd> {
    match &shown.source {
        Some(source) => clone(source, shown.read_only),
        None => nothing(),
    }
}

/// An empty directory that stays empty.
fn nothing() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Attaches a tree at a path below `/`, which belongs to the hostile side.
fn attach(tree: &OwnedFd, destination: &Path) -> rustix::io::Result<()> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let target = openat2(root, destination, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}
