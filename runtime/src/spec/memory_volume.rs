//! Volumes of a pod that Kubernetes wants in memory (`emptyDir` of the medium `Memory`).
//!
//! A kubelet mounts a file system in memory for each, in a directory [`KIND`] of the pod. Through the share it would
//! take the host's memory, beside the limit of whoever writes to it; so the pod gets such a volume in the guest's memory.
//! A part of a volume (`subPath`) is mounted elsewhere on the host, and known by its file system.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use sandbox_protocol::{Directory, MemoryVolume};

use super::Bundle;

/// What a kubelet calls the directory in which a pod's volumes of this kind are mounted.
const KIND: &str = "kubernetes.io~empty-dir";

/// The permissions in a mode, with the bits of set ids and of the sticky directory.
const PERMISSIONS: u32 = 0o7777;

/// The mounts of the host, as they were when they were read.
#[derive(Debug, Default)]
pub struct HostMounts(Vec<Mounted>);

/// The volume that the source of a bind mount is, or is in, and its path in there. `None`: it is in none, or the owners in
/// the guest's memory would not be those of the host, as where the container has users of its own.
pub fn of(mount: &Mount, bundle: &Bundle, mounts: &HostMounts) -> Option<(MemoryVolume, PathBuf)> {
    let has = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    let own_users = bundle.spec().linux().as_ref().is_some_and(|linux| has(linux.uid_mappings()));
    if own_users || has(mount.uid_mappings()) {
        return None;
    }
    let source = bundle.path().join(mount.source().as_ref()?).canonicalize().ok()?;
    let place = mounts.find(&source)?;
    let size = rustix::fs::statvfs(&place.top).ok()?;
    let parts: Vec<_> = place.below.ancestors().collect();
    let directories = parts.into_iter().rev().map(|part| directory(&place.top, part));
    let volume = MemoryVolume {
        name: place.device.replace(':', "-"),
        bytes: size.f_blocks.saturating_mul(size.f_frsize),
        directories: directories.collect::<io::Result<_>>().ok()?,
    };
    Some((volume, place.below))
}

fn directory(top: &Path, part: &Path) -> io::Result<Directory> {
    let found = fs::symlink_metadata(top.join(part))?;
    if !found.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let mode = found.mode() & PERMISSIONS;
    Ok(Directory { path: part.to_owned(), uid: found.uid(), gid: found.gid(), mode })
}

/// Where something is in a volume.
#[derive(Debug, PartialEq)]
struct Place {
    /// The number of the volume's file system, as `major:minor`.
    device: String,
    /// Where all of it is mounted.
    top: PathBuf,
    /// The path in it.
    below: PathBuf,
}

impl HostMounts {
    /// Reads them. Where that fails there are none, and so no volumes.
    pub fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Those of the text of `/proc/self/mountinfo`: see proc(5).
    fn parse(mountinfo: &str) -> Self {
        Self(mountinfo.lines().filter_map(Mounted::parse).collect())
    }

    /// Finds a path, which has no links in it.
    fn find(&self, path: &Path) -> Option<Place> {
        let above = self.0.iter().filter(|mount| path.starts_with(&mount.point));
        // Of those at the same place, the last one is on top.
        let own = above.max_by_key(|mount| mount.point.components().count())?;
        let is_volume = |mount: &&Mounted| {
            let directory = mount.point.parent().and_then(Path::file_name);
            mount.device == own.device
                && mount.root == Path::new("/")
                && directory.is_some_and(|name| name == KIND)
        };
        let volume = self.0.iter().filter(|mount| mount.is_tmpfs).find(is_volume)?;
        let below = own.root.strip_prefix("/").ok()?.join(path.strip_prefix(&own.point).ok()?);
        // Without the slash that joining nothing leaves.
        Some(Place {
            device: own.device.clone(),
            top: volume.point.clone(),
            below: below.components().collect(),
        })
    }
}

/// A line of that text.
#[derive(Debug)]
struct Mounted {
    device: String,
    root: PathBuf,
    point: PathBuf,
    is_tmpfs: bool,
}

impl Mounted {
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(2);
        let (device, root, point) = (before.next()?, before.next()?, before.next()?);
        let is_tmpfs = after.split(' ').next()? == "tmpfs";
        Some(Self { device: device.to_owned(), root: unescaped(root), point: unescaped(point), is_tmpfs })
    }
}

/// A path as it is: the kernel writes blanks and the like as a backslash and three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.extend(code);
        bytes.extend_from_slice(part.get(3..).unwrap_or_default().as_bytes());
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:22 / / rw - ext4 /dev/sda1 rw
30 24 0:30 / /pods/1/volumes/kubernetes.io~secret/key rw - tmpfs tmpfs rw
31 24 0:31 / /pods/1/volumes/kubernetes.io~empty-dir/cache rw,relatime shared:1 - tmpfs tmpfs rw,size=1024k
32 24 0:31 /a\\040b /pods/1/volume-subpaths/cache/one/0 rw shared:1 - tmpfs tmpfs rw
33 24 0:22 /x /pods/1/volumes/kubernetes.io~empty-dir/disk rw - ext4 /dev/sda1 rw
";

    #[test]
    fn a_volume_is_known_and_a_part_of_it_wherever_that_is_mounted() {
        let volume = "/pods/1/volumes/kubernetes.io~empty-dir/cache";
        let mounts = HostMounts::parse(MOUNTS);
        let found =
            |path: &str| mounts.find(Path::new(path)).map(|place| (place.device, place.top, place.below));
        for (path, below) in [
            (volume, ""),
            ("/pods/1/volumes/kubernetes.io~empty-dir/cache/sub/deep", "sub/deep"),
            ("/pods/1/volume-subpaths/cache/one/0", "a b"),
            ("/pods/1/volume-subpaths/cache/one/0/deep", "a b/deep"),
        ] {
            assert_eq!(found(path), Some(("0:31".into(), volume.into(), below.into())), "{path}");
        }
        for other in [
            "/",
            "/pods/1/volumes/kubernetes.io~secret/key",
            "/pods/1/volumes/kubernetes.io~empty-dir/disk",
            "/pods/1/volumes/kubernetes.io~empty-dir/on-the-disk",
            "/pods/1/volumes/kubernetes.io~empty-dir",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
        // What is mounted over it is not in it.
        let over = format!("{MOUNTS}34 31 0:22 / {volume} rw - ext4 /dev/sda1 rw\n");
        assert_eq!(HostMounts::parse(&over).find(Path::new(volume)), None);
    }
}
