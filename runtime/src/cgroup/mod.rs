//! The cgroup of the host that a sandbox is put in: where engines look for its processes and their usage.
//!
//! The container's limits hold in the guest, and the machine's process needs more than they allow. What the cgroup
//! limits is memory, to what the machine has and [`OVERHEAD_MIB`] besides: no more than that is lost to the host when the
//! process is broken into, or when a guest makes the host's kernel keep a great many files open for it.

mod systemd;

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use systemd::Scope;
pub use systemd::SystemdError;

/// How long a process that has nothing left to do may take to be gone, on a host that has little time for it.
const LAST_TIME: Duration = Duration::from_secs(10);

/// What a machine's processes have of memory besides the guest's, in MiB. A guest that knows a hundred thousand files
/// makes the host's kernel keep 150 MiB for them; QEMU takes 100 MiB.
pub const OVERHEAD_MIB: u64 = 512;

/// The limit of memory, in version 2 and in version 1.
const MEMORY_LIMITS: [&str; 2] = ["memory.max", "memory.limit_in_bytes"];

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
    /// The path is not one of systemd.
    #[error(
        "config.json: `linux.cgroupsPath`: `{0}` is not a scope of systemd, which --systemd-cgroup, or containerd's \
         option SystemdCgroup, asks for: write slice:prefix:name, such as system.slice:sandbox:name"
    )]
    NoScope(PathBuf),
    /// systemd has made none.
    #[error(
        "--systemd-cgroup: {0} (the engine can manage cgroups without systemd; for Podman: --cgroup-manager \
         cgroupfs, for Docker: native.cgroupdriver=cgroupfs, for containerd: SystemdCgroup = false)"
    )]
    Systemd(#[from] SystemdError),
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

/// A cgroup of the host, and who makes it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Cgroup {
    /// From the mount of each hierarchy.
    path: PathBuf,
    /// Of systemd; none: we make it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scope: Option<Scope>,
}

impl Cgroup {
    /// That of a path of config.json.
    ///
    /// Kubernetes names a pod's cgroup in systemd's words where its kubelet has systemd make the slices: the cgroup of
    /// the container is then made in the slice, as a scope would be, without systemd's help.
    pub fn of(path: &Path, manager: Manager) -> Result<Self, CgroupError> {
        if manager == Manager::Systemd {
            let scope = Scope::parse(path).ok_or_else(|| CgroupError::NoScope(path.into()))?;
            return Ok(Self { path: scope.path()?, scope: Some(scope) });
        }
        if let Some(scope) = Scope::parse(path) {
            return Ok(Self { path: scope.below_slices(), scope: None });
        }
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let relative: PathBuf =
            path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        match plain && !relative.as_os_str().is_empty() && !path.to_string_lossy().contains(':') {
            true => Ok(Self { path: relative, scope: None }),
            false => Err(CgroupError::Path(path.into())),
        }
    }

    /// Makes it in every hierarchy of this host, and puts processes into it.
    pub fn enter(&self, processes: impl Iterator<Item = u32> + Clone) -> Result<(), CgroupError> {
        if let Some(scope) = &self.scope {
            scope.start(&self.path, processes.clone())?;
        }
        // systemd does not know all controllers of version 1.
        for hierarchy in hierarchies() {
            let path = hierarchy.join(&self.path);
            let error = |step| {
                let path = path.clone();
                move |error| CgroupError::Kernel { step, path, error }
            };
            fs::create_dir_all(&path).map_err(error("make"))?;
            inherit_cpuset(&hierarchy, &self.path).map_err(error("give CPUs to"))?;
            for process in processes.clone() {
                fs::write(path.join("cgroup.procs"), process.to_string()).map_err(error("enter"))?;
            }
        }
        Ok(())
    }

    /// Limits its memory to that of a machine with so many MiB, where the host has memory under control there.
    pub fn limit(&self, machine_mib: u64) -> Result<(), CgroupError> {
        let bytes = (machine_mib + OVERHEAD_MIB) << 20;
        if let Some(scope) = &self.scope {
            // Or it would take the limit back one day.
            scope.limit_memory(bytes)?;
        }
        for path in hierarchies().into_iter().map(|hierarchy| hierarchy.join(&self.path)) {
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

    /// Removes it, where nothing is in it any more. The last of our own processes are given the time to end.
    pub fn remove(&self) {
        if let Some(scope) = &self.scope {
            scope.stop();
        }
        let deadline = Instant::now() + LAST_TIME;
        for hierarchy in hierarchies() {
            // Others may use it still, or have removed it already.
            while let Err(error) = fs::remove_dir(hierarchy.join(&self.path))
                && error.kind() == io::ErrorKind::ResourceBusy
                && Instant::now() < deadline
            {
                std::thread::sleep(POLL);
            }
        }
    }

    /// Takes processes out of it, back to the root of each hierarchy, and removes it.
    pub fn leave(&self, processes: impl Iterator<Item = u32> + Clone) {
        for hierarchy in hierarchies() {
            for process in processes.clone() {
                // One that has ended has left it.
                let _ = fs::write(hierarchy.join("cgroup.procs"), process.to_string());
            }
        }
        self.remove();
    }
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
        let of = |path: &str, manager| Cgroup::of(Path::new(path), manager);
        assert_eq!(of("/a/b", Manager::Cgroupfs).unwrap().path, Path::new("a/b"));
        assert_eq!(of("a", Manager::Cgroupfs).unwrap().path, Path::new("a"));
        let scope = of("kubepods-burstable-pod1.slice:cri-containerd:x", Manager::Cgroupfs).unwrap();
        let slices = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice";
        assert_eq!(scope.path, Path::new(slices).join("cri-containerd-x.scope"));
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
            assert!(of(bad, Manager::Cgroupfs).is_err(), "{bad}");
        }
        assert!(of("/a", Manager::Systemd).unwrap_err().to_string().contains("slice:prefix:name"));
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
