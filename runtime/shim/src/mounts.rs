//! The mounts of a root file system, which containerd has the shim make.

use std::io;
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// The most bytes of a mount's data, its final zero not counted: a page.
const MAX_DATA_BYTES: usize = 4095;

/// Why a root file system cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot {step} {} on {}: {error}", what, path.display())]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// The kind of file system, or its source.
        what: String,
        /// The mount point.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Something that is not supported.
    #[error("the mount of {what} on the root file system is not supported: {why}")]
    Unsupported {
        /// The kind of file system.
        what: String,
        /// Why not.
        why: &'static str,
    },
}

/// A root file system that was mounted. Dropping it unmounts it.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts these on a directory, one on the other, making it if there is none.
    pub fn on(directory: &Path, mounts: &[Mount]) -> Result<Self, MountError> {
        let mounted = Self(directory.into());
        if !mounts.is_empty() {
            std::fs::DirBuilder::new().recursive(true).create(directory).map_err(|error| {
                MountError::Kernel {
                    step: "make",
                    what: "the directory".into(),
                    path: directory.into(),
                    error,
                }
            })?;
        }
        for one in mounts {
            mount_one(one, directory)?;
        }
        Ok(mounted)
    }
}

impl Mounted {
    /// Unmounts it. Says why where that fails, which dropping cannot.
    pub fn unmount(self) -> Result<(), MountError> {
        unmount(&self.0)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0);
    }
}

/// Unmounts everything that is mounted on a directory.
pub fn unmount(directory: &Path) -> Result<(), MountError> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    loop {
        match umount2(directory, flags) {
            Ok(()) | Err(Errno::EINTR) => {}
            // Nothing is mounted there any more, or there is no such directory.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            // Somebody is still looking at it.
            Err(Errno::EBUSY) if !flags.contains(MntFlags::MNT_DETACH) => flags |= MntFlags::MNT_DETACH,
            Err(error) => {
                let what = "what is mounted".into();
                return Err(MountError::Kernel {
                    step: "unmount",
                    what,
                    path: directory.into(),
                    error: error.into(),
                });
            }
        }
    }
}

fn mount_one(wanted: &Mount, directory: &Path) -> Result<(), MountError> {
    let unsupported = |why| MountError::Unsupported { what: wanted.type_.clone(), why };
    if !wanted.target.is_empty() {
        return Err(unsupported("it is for a directory below the root"));
    }
    let (flags, data) = options(&wanted.options);
    if data.contains(&"loop") {
        return Err(unsupported("it needs a loop device"));
    }
    let kind = Some(wanted.type_.as_str()).filter(|kind| !matches!(*kind, "" | "bind"));
    let source = Some(wanted.source.as_str()).filter(|source| !source.is_empty());
    let result = match data.join(",") {
        short if short.len() <= MAX_DATA_BYTES => {
            let data = Some(short.as_str()).filter(|data| !data.is_empty());
            mount(source, directory, kind, flags, data)
        }
        long => match shorten(&long) {
            Some((base, short)) => mount_from(&base, source, directory, kind, flags, &short),
            None => return Err(unsupported("its options are too long")),
        },
    };
    // The kernel takes other flags of a bind mount only when it is there.
    let again = flags.contains(MsFlags::MS_BIND) && flags.intersects(!(MsFlags::MS_BIND | MsFlags::MS_REC));
    let result = result.and_then(|()| match again {
        true => mount(None::<&str>, directory, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>),
        false => Ok(()),
    });
    result.map_err(|error| MountError::Kernel {
        step: "mount",
        what: format!("{} ({})", wanted.type_, wanted.source),
        path: directory.into(),
        error: error.into(),
    })
}

/// Mounts from another working directory, which only a thread that ends with it has.
fn mount_from(
    base: &Path,
    source: Option<&str>,
    directory: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: &str,
) -> nix::Result<()> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(base)?;
            mount(source, directory, kind, flags, Some(data))
        });
        thread.join().unwrap_or(Err(Errno::EIO))
    })
}

/// The options of an overlay of many layers, with their paths from a directory that all are below.
fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let layers = data.split(',').find_map(|option| option.strip_prefix("lowerdir="))?;
    let paths: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let mut base = paths.first()?.parent()?.to_path_buf();
    while !paths.iter().all(|path| path.starts_with(&base)) {
        base = base.parent()?.to_path_buf();
    }
    let relative: Vec<&str> =
        paths.iter().map(|path| path.strip_prefix(&base).ok()?.to_str()).collect::<Option<_>>()?;
    let plain = |path: &&Path| {
        path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
    };
    if !paths.iter().all(plain) || relative.contains(&"") {
        return None;
    }
    let options: Vec<String> = data
        .split(',')
        .map(|option| match option.starts_with("lowerdir=") {
            true => format!("lowerdir={}", relative.join(":")),
            false => option.to_owned(),
        })
        .collect();
    let short = options.join(",");
    (short.len() <= MAX_DATA_BYTES).then_some((base, short))
}

/// The options of a mount as mount(8) has them, parted into flags and what is for the file system.
fn options(options: &[String]) -> (MsFlags, Vec<&str>) {
    let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, true, flag)) => flags |= *flag,
            Some((_, false, flag)) => flags &= !*flag,
            None => data.push(option.as_str()),
        }
    }
    (flags, data)
}

/// The names of flags, and whether they set or clear it.
const FLAGS: &[(&str, bool, MsFlags)] = &[
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("atime", false, MsFlags::MS_NOATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("defaults", true, MsFlags::empty()),
    ("dev", false, MsFlags::MS_NODEV),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("nodev", true, MsFlags::MS_NODEV),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("suid", false, MsFlags::MS_NOSUID),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        let given = ["rbind", "ro", "rw", "nosuid", "lowerdir=/a", "index=off"].map(String::from);
        let (flags, data) = options(&given);
        assert_eq!(flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID);
        assert_eq!(data, ["lowerdir=/a", "index=off"]);
    }

    #[test]
    fn the_paths_of_many_layers_are_shortened() {
        let layer =
            |n: usize| format!("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs");
        let layers: Vec<String> = (1..100).map(layer).collect();
        let long = format!("workdir={0}/w,upperdir={0}/u,lowerdir={1}", layer(0), layers.join(":"));
        let (base, short) = shorten(&long).unwrap();
        assert_eq!(base, Path::new(&layer(0)).parent().unwrap().parent().unwrap());
        assert!(short.contains("lowerdir=1/fs:2/fs:") && short.contains(&format!("upperdir={}/u", layer(0))));
        assert_eq!(shorten("lowerdir=/a/../b:/a/c"), None);
        assert_eq!(shorten("nothing"), None);
    }
}
