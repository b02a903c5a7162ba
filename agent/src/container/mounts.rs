//! The mounts of a container, made detached, given their attributes, and attached inside its root.
//!
//! A mount is never made at a path: the tree is held by a descriptor, and so is the place where it goes, which
//! was resolved inside the root. Nothing that the hostile side put there can lead it elsewhere.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{CWD, OFlags, fstat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use sandbox_protocol::MEMORY_MOUNT;

use super::beneath::{BeneathError, Kind, Root};
use super::mount_options::{Attributes, Bind, MountOptions, Propagation, UnsupportedOption};
use super::{copy_up, volumes};

/// The most bytes of what the kernel says about a mount that it refuses.
const KERNEL_WORDS_BYTES: usize = 1024;

/// The sticky mode of a temporary directory is not taken over from a mount point; the nine permissions are.
const PERMISSIONS: u32 = 0o7777;

/// A mount could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {what} at {destination} (mounts[{index}] of config.json): {source}")]
pub struct MountError {
    index: usize,
    what: String,
    destination: PathBuf,
    source: Box<MountStepError>,
}

impl MountError {
    fn of(index: usize, mount: &Mount) -> impl FnOnce(MountStepError) -> Self {
        move |source| Self {
            index,
            what: describe(mount),
            destination: mount.destination().clone(),
            source: Box::new(source),
        }
    }
}

/// The step at which it failed.
#[derive(Debug, thiserror::Error)]
pub enum MountStepError {
    /// An option is not supported.
    #[error(transparent)]
    Option(#[from] UnsupportedOption),
    /// The mount point could not be made.
    #[error(transparent)]
    Destination(#[from] BeneathError),
    /// The mount point is a symbolic link or a file, where what has to be at this very path would be elsewhere.
    #[error("{0} must be mounted on an ordinary directory")]
    NotADirectory(String),
    /// The source is missing in the configuration.
    #[error("it has no source")]
    NoSource,
    /// The source could not be opened.
    #[error("cannot open its source {path}: {source}")]
    Source {
        /// The source, as the guest sees it.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// The file system refused an option.
    #[error("{kind} refuses the option {option:?}: {reason}")]
    Data {
        /// The file system.
        kind: String,
        /// The option.
        option: String,
        /// What the kernel says.
        reason: String,
    },
    /// The guest's kernel has no such file system, or refused it.
    #[error("the guest's kernel refuses a file system of type {kind:?}: {reason}")]
    FileSystem {
        /// The type.
        kind: String,
        /// What the kernel says.
        reason: String,
    },
    /// A tmpfs could not be filled.
    #[error("cannot copy what is there into it (tmpcopyup): {0}")]
    CopyUp(Errno),
    /// The mount's attributes or propagation were refused.
    #[error("cannot set its attributes: {0}")]
    Attributes(Errno),
    /// It could not be attached.
    #[error("cannot attach it: {0}")]
    Attach(Errno),
}

/// Where the guest itself has its devices' file system.
const GUEST_SYSFS: &str = "/sys";

/// What mounts need to know of their container.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The container's cgroup, where it has no cgroup namespace and is to see this directory only.
    pub cgroup: Option<&'a Path>,
}

/// Makes the configured mounts, in order.
pub fn carry_out(mounts: &[Mount], root: &Root, around: Surroundings<'_>) -> Result<(), MountError> {
    for (index, mount) in mounts.iter().enumerate() {
        make(mount, root, around).map_err(MountError::of(index, mount))?;
    }
    Ok(())
}

/// Makes `/dev` read-only where the configuration says so: it was needed writable until now.
pub fn finish(mounts: &[Mount], root: &Root) -> Result<(), MountError> {
    for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| is_dev(mount)) {
        seal_dev(mount, root).map_err(MountError::of(index, mount))?;
    }
    Ok(())
}

fn describe(mount: &Mount) -> String {
    match (mount.typ(), mount.source()) {
        (Some(kind), _) if kind != "bind" && kind != "none" => kind.clone(),
        (_, Some(source)) => source.display().to_string(),
        _ => "nothing".to_owned(),
    }
}

fn make(mount: &Mount, root: &Root, around: Surroundings<'_>) -> Result<(), MountStepError> {
    let mut options = MountOptions::parse(mount.options().as_deref().unwrap_or_default())?;
    if is_dev(mount) {
        options.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    if options.remount {
        let target = root.open(mount.destination(), OFlags::PATH)?;
        return set_options(target.as_fd(), &options);
    }
    refuse_links(mount, root)?;
    let tree = tree(mount, &mut options, root, around)?;
    let kind = Kind::of(&tree).map_err(MountStepError::Attach)?;
    let target = root.make(mount.destination(), kind)?;
    if options.copy_up && mount.typ().as_deref() == Some("tmpfs") {
        copy_up(root, mount.destination(), &tree)?;
    }
    set_options(tree.as_fd(), &options)?;
    attach(&tree, target.as_fd()).map_err(MountStepError::Attach)
}

/// Refuses an image whose `/proc` or `/sys` is a link: paths in them are masked, and others make programs believe what
/// they read there.
fn refuse_links(mount: &Mount, root: &Root) -> Result<(), MountStepError> {
    let Some(kind @ ("proc" | "sysfs")) = mount.typ().as_deref() else { return Ok(()) };
    // What is not there will be made.
    let Ok(found) = root.open(mount.destination(), OFlags::PATH | OFlags::NOFOLLOW) else { return Ok(()) };
    match Kind::of(&found).map_err(MountStepError::Attach)? {
        Kind::Directory => Ok(()),
        Kind::File => Err(MountStepError::NotADirectory(kind.to_owned())),
    }
}

/// Makes the detached tree.
fn tree(
    mount: &Mount,
    options: &mut MountOptions,
    root: &Root,
    around: Surroundings<'_>,
) -> Result<OwnedFd, MountStepError> {
    let kind = mount.typ().as_deref().unwrap_or("none");
    if kind == "bind" && options.bind == Bind::No {
        options.bind = Bind::Single;
    }
    if options.bind != Bind::No {
        let source = mount.source().as_ref().ok_or(MountStepError::NoSource)?;
        return match source.strip_prefix(MEMORY_MOUNT) {
            Ok(inside) => clone_of_volume(source, inside, options.bind),
            Err(_) => clone_tree(source, options.bind),
        };
    }
    match kind {
        "cgroup" | "cgroup2" => match around.cgroup {
            Some(own) => clone_tree(own, Bind::Single),
            None => file_system("cgroup2", None, &[]),
        },
        "tmpfs" => {
            keep_mode(options, root, mount.destination())?;
            file_system(kind, source_of(mount), &options.data)
        }
        // It shows a network, and the root of a user namespace may make it for a network of its own only.
        "sysfs" => file_system(kind, source_of(mount), &options.data)
            .or_else(|refused| clone_tree(Path::new(GUEST_SYSFS), Bind::Recursive).map_err(|_| refused)),
        _ => file_system(kind, source_of(mount), &options.data),
    }
}

/// Fills a tmpfs that is mounted nowhere yet.
fn copy_up(root: &Root, destination: &Path, tree: &OwnedFd) -> Result<(), MountStepError> {
    let hidden = root.open(destination, OFlags::DIRECTORY)?;
    copy_up::copy(hidden.as_fd(), tree.as_fd()).map_err(MountStepError::CopyUp)
}

fn source_of(mount: &Mount) -> Option<&str> {
    mount.source().as_ref().and_then(|source| source.to_str())
}

/// A tmpfs has the mode of the directory that it hides, unless the configuration has another.
fn keep_mode(options: &mut MountOptions, root: &Root, destination: &Path) -> Result<(), MountStepError> {
    if options.datum("mode").is_some() {
        return Ok(());
    }
    if let Some(hidden) = root.look(destination)? {
        let mode = fstat(&hidden).map_err(MountStepError::Attach)?.st_mode & PERMISSIONS;
        options.data.push(("mode".to_owned(), Some(format!("{mode:o}"))));
    }
    Ok(())
}

/// A detached copy of what the guest has at a path. The path's last name is not followed.
pub fn clone_tree(source: &Path, bind: Bind) -> Result<OwnedFd, MountStepError> {
    let flags = clone_flags(bind) | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    open_tree(CWD, source, flags).map_err(|e| MountStepError::Source { path: source.to_owned(), source: e })
}

/// A detached copy of what a volume in the guest's memory has at a path. What containers put there leads nowhere else.
fn clone_of_volume(source: &Path, inside: &Path, bind: Bind) -> Result<OwnedFd, MountStepError> {
    let flags = clone_flags(bind) | OpenTreeFlags::AT_EMPTY_PATH;
    let failed = |e| MountStepError::Source { path: source.to_owned(), source: e };
    open_tree(volumes::open(inside).map_err(failed)?, "", flags).map_err(failed)
}

/// How much of what is mounted at a place is copied.
fn clone_flags(bind: Bind) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if bind == Bind::Recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// A new file system, mounted nowhere yet.
pub fn file_system(
    kind: &str,
    source: Option<&str>,
    data: &[(String, Option<String>)],
) -> Result<OwnedFd, MountStepError> {
    let refused = |reason| MountStepError::FileSystem { kind: kind.to_owned(), reason };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| refused(e.to_string()))?;
    if let Some(source) = source {
        fsconfig_set_string(&context, "source", source).map_err(|e| refused(kernel_words(&context, e)))?;
    }
    for (key, value) in data {
        match value {
            Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str()),
            None => fsconfig_set_flag(&context, key.as_str()),
        }
        .map_err(|e| MountStepError::Data {
            kind: kind.to_owned(),
            option: value.as_ref().map_or(key.clone(), |value| format!("{key}={value}")),
            reason: kernel_words(&context, e),
        })?;
    }
    fsconfig_create(&context).map_err(|e| refused(kernel_words(&context, e)))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .map_err(|e| refused(kernel_words(&context, e)))
}

/// What the kernel says about a refusal, or the error's own words.
fn kernel_words(context: &OwnedFd, error: Errno) -> String {
    let mut words = [0; KERNEL_WORDS_BYTES];
    let read = rustix::io::read(context, &mut words).unwrap_or(0);
    let text = String::from_utf8_lossy(words.get(..read).unwrap_or_default());
    // The kernel puts a letter for the severity in front.
    match text.trim().split_once(' ') {
        Some((_, message)) => format!("{message} ({error})"),
        None => error.to_string(),
    }
}

fn set_options(tree: BorrowedFd<'_>, options: &MountOptions) -> Result<(), MountStepError> {
    set_attributes(tree, options.recursive, true)
        .and_then(|()| set_attributes(tree, options.attributes, false))
        .and_then(|()| options.propagation.iter().try_for_each(|p| set_propagation(tree, *p)))
        .map_err(MountStepError::Attributes)
}

/// Sets and clears attributes of a mount, or of it and all below it.
pub fn set_attributes(
    tree: BorrowedFd<'_>,
    attributes: Attributes,
    recursive: bool,
) -> rustix::io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    mount_setattr(tree, attributes, 0, recursive)
}

/// Sets the propagation of a mount.
pub fn set_propagation(tree: BorrowedFd<'_>, propagation: Propagation) -> rustix::io::Result<()> {
    mount_setattr(tree, Attributes::default(), propagation.kind, propagation.recursive)
}

fn mount_setattr(
    tree: BorrowedFd<'_>,
    attributes: Attributes,
    propagation: u64,
    recursive: bool,
) -> rustix::io::Result<()> {
    const EMPTY: &CStr = c"";
    let change =
        libc::mount_attr { attr_set: attributes.set, attr_clr: attributes.clear, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path and the structure are valid and outlive the call, which only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

/// Attaches a detached tree.
pub fn attach(tree: &OwnedFd, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Whether the container is to write to its cgroups.
pub fn cgroup_is_writable(spec: &Spec) -> bool {
    let read_only = |options: &[String]| options.iter().any(|o| o == "ro");
    spec.mounts().iter().flatten().any(|mount| {
        matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"))
            && !read_only(mount.options().as_deref().unwrap_or_default())
    })
}

/// Whether this is a file system at `/dev`.
pub fn is_dev(mount: &Mount) -> bool {
    let bind = |options: &[String]| options.iter().any(|o| o == "bind" || o == "rbind");
    is_at_dev(mount)
        && mount.typ().as_deref() != Some("bind")
        && !bind(mount.options().as_deref().unwrap_or_default())
}

/// Whether this is mounted at `/dev`.
pub fn is_at_dev(mount: &Mount) -> bool {
    mount.destination().components().eq(Path::new("/dev").components())
}

fn seal_dev(mount: &Mount, root: &Root) -> Result<(), MountStepError> {
    let options = MountOptions::parse(mount.options().as_deref().unwrap_or_default())?;
    let read_only = Attributes { set: options.attributes.set & libc::MOUNT_ATTR_RDONLY, clear: 0 };
    let target = root.open(mount.destination(), OFlags::PATH)?;
    set_attributes(target.as_fd(), read_only, false).map_err(MountStepError::Attributes)
}
