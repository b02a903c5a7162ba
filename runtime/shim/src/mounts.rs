//! The mounts of a root file system, which containerd has the shim make.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use sandbox_loop_device::{Attached, Wanted};

/// The option of a mount whose source is a file that a block device is to be made of.
const LOOP: &str = "loop";

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
    let (flags, mut data) = options(&wanted.options);
    let image = match data.contains(&LOOP) {
        true => Some(image(Path::new(&wanted.source), flags)?),
        false => None,
    };
    data.retain(|option| *option != LOOP);
    let device = image.as_ref().map(|image| sandbox_loop_device::node_of(image.number));
    let kind = Some(wanted.type_.as_str()).filter(|kind| !matches!(*kind, "" | "bind"));
    let source = device.as_deref().unwrap_or(Path::new(&wanted.source));
    let source = Some(source).filter(|source| !source.as_os_str().is_empty());
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

/// A block device over a file, which goes when it is unmounted: or, if that is not to be, now.
fn image(file: &Path, flags: MsFlags) -> Result<Attached, MountError> {
    let read_only = flags.contains(MsFlags::MS_RDONLY);
    let opened = File::options().read(true).write(!read_only).open(file);
    let wanted = Wanted { read_only, temporary: true, ..Wanted::default() };
    opened.and_then(|opened| sandbox_loop_device::attach(opened.as_fd(), wanted)).map_err(|error| {
        let what = "a loop device".into();
        MountError::Kernel { step: "attach", what, path: file.into(), error }
    })
}

/// Mounts from another working directory, which only a thread that ends with it has.
fn mount_from(
    base: &Path,
    source: Option<&Path>,
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

    fn expect_no_device(image: &Path) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let devices =
            || std::process::Command::new("losetup").arg("--associated").arg(image).output().unwrap();
        // Older kernels detach it a moment after its last user is gone.
        while !devices().stdout.is_empty() {
            assert!(std::time::Instant::now() < deadline, "a device is left");
            std::thread::yield_now();
        }
    }

    /// As the blockfile snapshotter of containerd has them.
    #[test]
    fn an_image_is_mounted_and_its_device_goes_with_the_mount() {
        let work = tempfile::tempdir().unwrap();
        let (image, root) = (work.path().join("image"), work.path().join("root"));
        File::create(&image).and_then(|file| file.set_len(4 << 20)).unwrap();
        let mkfs = std::process::Command::new("mkfs.ext4").arg("-q").arg(&image).status();
        if !mkfs.is_ok_and(|status| status.success()) || !Path::new("/dev/loop0").exists() {
            eprintln!("SKIPPED: this host has no mkfs.ext4, or no loop devices");
            return;
        }
        let mount = |option: &str| Mount {
            type_: "ext4".into(),
            source: image.to_str().unwrap().into(),
            options: [option, "loop"].map(Into::into).into(),
            ..Mount::default()
        };
        let mounted = Mounted::on(&root, &[mount("rw")]).unwrap();
        std::fs::write(root.join("file"), "kept").unwrap();
        mounted.unmount().unwrap();
        let mounted = Mounted::on(&root, &[mount("ro")]).unwrap();
        assert_eq!(std::fs::read_to_string(root.join("file")).unwrap(), "kept");
        assert!(std::fs::write(root.join("file"), "more").is_err());
        mounted.unmount().unwrap();
        expect_no_device(&image);
        // One that cannot be mounted leaves no device either.
        std::fs::write(&image, [0; 1 << 20]).unwrap();
        let error = Mounted::on(&root, &[mount("rw")]).unwrap_err().to_string();
        assert!(error.contains("cannot mount ext4"), "{error}");
        expect_no_device(&image);
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
