//! `/dev` of a container: device nodes, the links that programs expect, and the console.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, fstat, major, makedev, minor, mknodat,
    openat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::beneath::{BeneathError, Kind, Root};
use super::mount_options::Bind;
use super::mounts::{self, MountStepError};

/// A part of `/dev` could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The directory that it goes into could not be made.
    #[error(transparent)]
    Parent(#[from] BeneathError),
    /// A number that no device has.
    #[error("linux.devices: {path} has the number {number}, which no device has")]
    Number {
        /// The device's path.
        path: PathBuf,
        /// The number.
        number: i64,
    },
    /// The node could not be made.
    #[error("cannot make the device {path}: {source}")]
    Node {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// Something else is in its place.
    #[error("cannot make the device {0}: the root file system has something else there")]
    Occupied(PathBuf),
    /// The guest's own node could not be shown in its place.
    #[error("cannot show the guest's device {path}: {source}")]
    Bind {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: MountStepError,
    },
    /// A link could not be made.
    #[error("cannot make the link {path}: {source}")]
    Link {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// The terminal could not be shown as the console.
    #[error("cannot show the terminal at /dev/console: {0}")]
    Console(Errno),
}

struct Node {
    path: PathBuf,
    /// Where the guest itself has it.
    guests: PathBuf,
    kind: FileType,
    device: u64,
    mode: u32,
    owner: Uid,
    group: Gid,
}

/// The devices that every container has, by path, major and minor number.
const BASIC: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The links that every container has. The last is made only where its target exists.
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
];

/// Fills `/dev`, unless the configuration binds one of its own there.
pub fn populate(spec: &Spec, root: &Root) -> Result<(), DeviceError> {
    let mounts: &[Mount] = spec.mounts().as_deref().unwrap_or_default();
    if mounts.iter().any(|mount| mounts::is_at_dev(mount) && !mounts::is_dev(mount)) {
        return Ok(());
    }
    for (path, major, minor) in BASIC {
        make_node(root, &basic(path, major, minor))?;
    }
    let configured = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    for device in configured {
        make_node(root, &configured_node(device)?)?;
    }
    for (target, path) in LINKS {
        if path != "/dev/core" || Path::new(target).exists() {
            make_link(root, target, Path::new(path))?;
        }
    }
    replace_ptmx(root)
}

fn basic(path: &str, major: u32, minor: u32) -> Node {
    Node {
        path: path.into(),
        guests: path.into(),
        kind: FileType::CharacterDevice,
        device: makedev(major, minor),
        mode: 0o666,
        owner: Uid::ROOT,
        group: Gid::ROOT,
    }
}

fn configured_node(device: &LinuxDevice) -> Result<Node, DeviceError> {
    let number = |number: i64| {
        u32::try_from(number).map_err(|_| DeviceError::Number { path: device.path().clone(), number })
    };
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A | LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
    };
    Ok(Node {
        path: device.path().clone(),
        guests: guests_own(device),
        kind,
        device: match kind {
            FileType::Fifo => 0,
            _ => makedev(number(device.major())?, number(device.minor())?),
        },
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        owner: Uid::from_raw(device.uid().unwrap_or(0)),
        group: Gid::from_raw(device.gid().unwrap_or(0)),
    })
}

/// A loop device may have any name in a container.
fn guests_own(device: &LinuxDevice) -> PathBuf {
    let minor = u32::try_from(device.minor()).ok();
    match minor.filter(|_| {
        device.typ() == LinuxDeviceType::B && device.major() == i64::from(sandbox_loop_device::MAJOR)
    }) {
        Some(number) => sandbox_loop_device::node_of(number),
        None => device.path().clone(),
    }
}

fn make_node(root: &Root, node: &Node) -> Result<(), DeviceError> {
    let failed = |source| DeviceError::Node { path: node.path.clone(), source };
    let (parent, name) = root.parent(&node.path)?;
    match mknodat(&parent, &name, node.kind, Mode::from_raw_mode(node.mode), node.device) {
        Ok(()) => {}
        Err(Errno::EXIST) => return check_node(&parent, &name, node),
        // A root through the share, whose host makes no device nodes.
        Err(Errno::PERM | Errno::ACCESS) => return show_guests_own(root, node),
        Err(e) => return Err(failed(e)),
    }
    chownat(&parent, &name, Some(node.owner), Some(node.group), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    // The umask may have taken from the mode, and a change of owner takes the set-id bits.
    chmodat(&parent, &name, Mode::from_raw_mode(node.mode), AtFlags::empty()).map_err(failed)
}

/// A node that is there already must be the device: whatever else the root has there is not to be taken for it.
fn check_node(parent: &OwnedFd, name: &std::ffi::OsStr, node: &Node) -> Result<(), DeviceError> {
    let found = openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .and_then(fstat)
        .map_err(|source| DeviceError::Node { path: node.path.clone(), source })?;
    let same_kind = FileType::from_raw_mode(found.st_mode) == node.kind;
    let same_number = node.kind == FileType::Fifo
        || (major(found.st_rdev), minor(found.st_rdev)) == (major(node.device), minor(node.device));
    if same_kind && same_number { Ok(()) } else { Err(DeviceError::Occupied(node.path.clone())) }
}

fn show_guests_own(root: &Root, node: &Node) -> Result<(), DeviceError> {
    let bind = |source| DeviceError::Bind { path: node.path.clone(), source };
    let tree = mounts::clone_tree(&node.guests, Bind::Single).map_err(bind)?;
    let target = root.make(&node.path, Kind::File)?;
    mounts::attach(&tree, target.as_fd()).map_err(|e| bind(MountStepError::Attach(e)))
}

fn make_link(root: &Root, target: &str, path: &Path) -> Result<(), DeviceError> {
    let (parent, name) = root.parent(path)?;
    match symlinkat(target, &parent, &name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(source) => Err(DeviceError::Link { path: path.to_owned(), source }),
    }
}

/// `/dev/ptmx` must be that of the container's own terminals.
fn replace_ptmx(root: &Root) -> Result<(), DeviceError> {
    let path = Path::new("/dev/ptmx");
    let link_error = |source| DeviceError::Link { path: path.to_owned(), source };
    let (parent, name) = root.parent(path)?;
    match unlinkat(&parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(source) => return Err(link_error(source)),
    }
    symlinkat("pts/ptmx", &parent, &name).map_err(link_error)
}

/// Shows a terminal at `/dev/console`.
pub fn show_console(root: &Root, terminal: &OwnedFd) -> Result<(), DeviceError> {
    let path = Path::new("/dev/console");
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(terminal, "", flags).map_err(DeviceError::Console)?;
    // Not followed: the root could have a link there that hides another file.
    let (parent, name) = root.parent(path)?;
    let create = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(&parent, &name, create | OFlags::EXCL, Mode::from(0o600)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(e) => return Err(DeviceError::Console(e)),
    }
    let target = openat(&parent, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(DeviceError::Console)?;
    mounts::attach(&tree, target.as_fd()).map_err(DeviceError::Console)
}
