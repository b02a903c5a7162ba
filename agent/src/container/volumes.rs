//! Volumes in the guest's memory, which the containers of a pod share: a file system for each, for as long as the guest
//! is there. What is written to it is accounted to the container that writes.
//!
//! They are the containers', so a path in one is resolved inside it, as in a container's root.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use rustix::fs::{Gid, Mode, OFlags, Uid, fchmod, fchown};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use sandbox_protocol::{Directory, MEMORY_MOUNT, MemoryVolume};

use super::beneath::{Kind, Root};

/// A volume could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} of the volume {name:?} in the guest's memory: {source}")]
pub struct VolumeError {
    step: &'static str,
    name: String,
    source: io::Error,
}

/// Makes what a container is going to mount, as far as it is not there.
pub fn make(volumes: &[MemoryVolume]) -> Result<(), VolumeError> {
    for volume in volumes {
        let failed = |step| move |source| VolumeError { step, name: volume.name.clone(), source };
        make_file_system(volume).map_err(failed("make the file system"))?;
        for directory in &volume.directories {
            make_directory(volume, directory).map_err(failed("make a directory"))?;
        }
    }
    Ok(())
}

fn make_file_system(volume: &MemoryVolume) -> io::Result<()> {
    let place = Path::new(MEMORY_MOUNT).join(&volume.name);
    std::fs::create_dir_all(MEMORY_MOUNT)?;
    match std::fs::create_dir(&place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        done => done?,
    }
    // Without a word about its size it is half of the memory.
    let memory = rustix::system::sysinfo();
    let is_larger = u128::from(volume.bytes) >= u128::from(memory.totalram) * u128::from(memory.mem_unit);
    let size = if is_larger { String::new() } else { format!("size={}", volume.bytes) };
    let size = std::ffi::CString::new(size)?;
    rustix::mount::mount("memory", &place, "tmpfs", MountFlags::empty(), size.as_c_str()).inspect_err(
        |_| {
            let _ = std::fs::remove_dir(&place);
        },
    )?;
    let Some(top) = volume.directories.first() else { return Ok(()) };
    Ok(give(&open(Path::new(&volume.name))?, top)?)
}

fn make_directory(volume: &MemoryVolume, directory: &Directory) -> io::Result<()> {
    let root = Root::new(open(Path::new(&volume.name))?);
    if directory.path.as_os_str().is_empty() || root.look(&directory.path).map_err(|e| e.source)?.is_some() {
        return Ok(());
    }
    root.make(&directory.path, Kind::Directory).map_err(|e| e.source)?;
    let made = root.open(&directory.path, OFlags::DIRECTORY).map_err(|e| e.source)?;
    Ok(give(&made, directory)?)
}

/// Gives a directory its owner and its permissions: these last, as a change of the owner takes some away.
fn give(made: &OwnedFd, like: &Directory) -> rustix::io::Result<()> {
    fchown(made, Some(Uid::from_raw(like.uid)), Some(Gid::from_raw(like.gid)))?;
    fchmod(made, Mode::from_raw_mode(like.mode))
}

/// Opens what is at a path below [`MEMORY_MOUNT`]: the name of a volume, and a path in it.
pub fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let mut parts = path.components();
    let Some(Component::Normal(name)) = parts.next() else { return Err(Errno::NOENT) };
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::open(Path::new(MEMORY_MOUNT).join(name), flags, Mode::empty())?;
    match parts.as_path() {
        inside if inside.as_os_str().is_empty() => Ok(top),
        inside => Root::new(top).open(inside, OFlags::PATH).map_err(|e| e.source),
    }
}
