//! The cgroup of the host that a sandbox is put in: where engines look for its processes and their usage.
//!
//! The container's limits hold in the guest, and the machine's process needs more than they allow. What the cgroup
//! limits is memory, to what the machine has and [`OVERHEAD_MIB`] besides: no more than that is lost to the host when the
//! process is broken into, or when a guest makes the host's kernel keep a great many files open for it.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a process that has nothing left to do may take to be gone, on a host that has little time for it.
const LAST_TIME: Duration = Duration::from_secs(10);

/// What a machine's processes have of memory besides the guest's, in MiB. A guest that knows a hundred thousand files
/// makes the host's kernel keep 150 MiB for them; QEMU takes 100 MiB.
pub const OVERHEAD_MIB: u64 = 512;

/// The limit of memory, in version 2 and in version 1.
const MEMORY_LIMITS: [&str; 2] = ["memory.max", "memory.limit_in_bytes"];

/// There where systemd is the host's init, see sd_booted(3).
const SYSTEMD: &str = "/run/systemd/system";

const POLL: Duration = Duration::from_millis(2);

/// Why a cgroup cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path leads elsewhere.
    #[error(
        "config.json: `linux.cgroupsPath`: `{0}` is not the path of a cgroup: write one such as /sandboxes/name \
         or kubepods.slice:prefix:name"
    )]
    Path(PathBuf),
    /// systemd is wanted, which is not supported.
    #[error(
        "--systemd-cgroup: {0}: let the engine manage cgroups itself (for Podman: --cgroup-manager cgroupfs; for \
         Docker: native.cgroupdriver=cgroupfs)"
    )]
    Systemd(&'static str),
    /// The kernel refused.
    #[error("cannot {step} the cgroup {}: {error}", path.display())]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// The cgroup's directory.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
}

/// Who puts a sandbox into a cgroup.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum Manager {
    /// We do, through the file systems of the hierarchies.
    #[default]
    Cgroupfs,
    /// systemd does.
    Systemd,
    /// Nobody does.
    Disabled,
}

/// Checks a path of config.json, and makes it one below the mounts of the hierarchies.
///
/// Kubernetes names a pod's cgroup in systemd's words where its kubelet has systemd make the slices: the cgroup of the
/// container is then made in the slice, as a scope would be, without systemd's help.
pub fn check(path: &Path, manager: Manager) -> Result<PathBuf, CgroupError> {
    if manager == Manager::Systemd {
        return Err(CgroupError::Systemd(match Path::new(SYSTEMD).is_dir() {
            true => "cgroups made by systemd are not supported yet",
            false => "systemd does not run on this host, which has no /run/systemd/system",
        }));
    }
    if let Some(scope) = path.to_str().and_then(scope) {
        return Ok(scope);
    }
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let relative: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    match plain && !relative.as_os_str().is_empty() && !path.to_string_lossy().contains(':') {
        true => Ok(relative),
        false => Err(CgroupError::Path(path.into())),
    }
}

/// The path of the scope that `slice:prefix:name` stands for, see systemd.slice(5): a slice `a-b.slice` is in `a.slice`.
fn scope(path: &str) -> Option<PathBuf> {
    let words: Vec<&str> = path.split(':').collect();
    let &[slice, prefix, name] = &words[..] else { return None };
    let stem = slice.strip_suffix(".slice")?;
    let plain = |word: &str| !word.is_empty() && !word.contains('/') && !word.starts_with('.');
    if ![stem, prefix, name].into_iter().all(plain) || stem.split('-').any(str::is_empty) {
        return None;
    }
    let ends = stem.match_indices('-').map(|(end, _)| end).chain([stem.len()]);
    let slices: PathBuf = ends.map(|end| format!("{}.slice", &stem[..end])).collect();
    Some(slices.join(format!("{prefix}-{name}.scope")))
}

/// Makes the cgroup in every hierarchy of this host, and puts processes into it.
pub fn enter(relative: &Path, processes: impl Iterator<Item = u32> + Clone) -> Result<(), CgroupError> {
    for hierarchy in hierarchies() {
        let path = hierarchy.join(relative);
        let error = |step| {
            let path = path.clone();
            move |error| CgroupError::Kernel { step, path, error }
        };
        fs::create_dir_all(&path).map_err(error("make"))?;
        inherit_cpuset(&hierarchy, relative).map_err(error("give CPUs to"))?;
        for process in processes.clone() {
            fs::write(path.join("cgroup.procs"), process.to_string()).map_err(error("enter"))?;
        }
    }
    Ok(())
}

/// Limits the memory of the cgroup to that of a machine with so many MiB, where the host has memory under control there.
pub fn limit(relative: &Path, machine_mib: u64) -> Result<(), CgroupError> {
    let bytes = (machine_mib + OVERHEAD_MIB) << 20;
    for path in hierarchies().into_iter().map(|hierarchy| hierarchy.join(relative)) {
        for file in MEMORY_LIMITS.iter().map(|name| path.join(name)).filter(|file| file.exists()) {
            fs::write(&file, bytes.to_string()).map_err(|error| CgroupError::Kernel {
                step: "limit the memory of",
                path: path.clone(),
                error,
            })?;
        }
    }
    Ok(())
}

/// Removes the cgroup, where nothing is in it any more. The last of our own processes are given the time to end.
pub fn remove(relative: &Path) {
    let deadline = Instant::now() + LAST_TIME;
    for hierarchy in hierarchies() {
        // Others may use it still, or have removed it already.
        while let Err(error) = fs::remove_dir(hierarchy.join(relative))
            && error.kind() == io::ErrorKind::ResourceBusy
            && Instant::now() < deadline
        {
            std::thread::sleep(POLL);
        }
    }
}

/// Takes processes out of the cgroup, back to the root of each hierarchy, and removes it.
pub fn leave(relative: &Path, processes: impl Iterator<Item = u32> + Clone) {
    for hierarchy in hierarchies() {
        for process in processes.clone() {
            // One that has ended has left it.
            let _ = fs::write(hierarchy.join("cgroup.procs"), process.to_string());
        }
    }
    remove(relative);
}

/// A new cgroup of version 1 has no CPUs and no memory nodes, and takes no process.
fn inherit_cpuset(hierarchy: &Path, relative: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let mut directory = hierarchy.to_path_buf();
        if !directory.join("cpuset.sched_load_balance").exists() {
            return Ok(());
        }
        for part in relative.components() {
            let inherited = fs::read_to_string(directory.join(file))?;
            directory.push(part);
            if fs::read_to_string(directory.join(file))?.trim().is_empty() {
                fs::write(directory.join(file), inherited.trim())?;
            }
        }
    }
    Ok(())
}

/// Where the hierarchies are mounted: one of version 2, or one for each set of controllers of version 1.
fn hierarchies() -> Vec<PathBuf> {
    mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// The mount points of cgroup file systems in the text of `/proc/self/mountinfo`, see proc(5).
fn mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next(), before.next());
        let kind = after.split(' ').next();
        // Only a hierarchy's own root: a part of one mounted elsewhere is the affair of whoever did that.
        if let (Some("/"), Some(point), Some("cgroup" | "cgroup2")) = (root, point, kind)
            && point.starts_with("/sys/fs/cgroup")
        {
            found.push(point.into());
        }
    }
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_below_the_mounts() {
        assert_eq!(check(Path::new("/a/b"), Manager::Cgroupfs).unwrap(), Path::new("a/b"));
        assert_eq!(check(Path::new("a"), Manager::Cgroupfs).unwrap(), Path::new("a"));
        let scope =
            check(Path::new("kubepods-burstable-pod1.slice:cri-containerd:x"), Manager::Cgroupfs).unwrap();
        let slices = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice";
        assert_eq!(scope, Path::new(slices).join("cri-containerd-x.scope"));
        for bad in [
            "",
            "/",
            "../a",
            "/a/../b",
            "a:b:c",
            "a--b.slice:c:d",
            ".slice:a:b",
            "a.slice:../b:c",
            "a.slice:b",
        ] {
            assert!(check(Path::new(bad), Manager::Cgroupfs).is_err(), "{bad}");
        }
        assert!(check(Path::new("/a"), Manager::Systemd).unwrap_err().to_string().contains("cgroupfs"));
    }

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let text = "\
24 1 0:22 / /proc rw - proc proc rw
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
33 30 0:28 /part /mnt/part rw - cgroup2 cgroup2 rw
";
        let expected = ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        assert_eq!(mounts(text), expected);
    }
}
