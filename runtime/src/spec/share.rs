//! From the host's paths to the guest's: what the machine has to share, and the configuration that goes in.
//!
//! The guest sees one share. A container has a directory in it with `rootfs` and, for each bind mount, `mounts/<n>`
//! where n is the mount's place in the configuration. The directory of a sandbox's first container is named by its id;
//! that of a container that joins has a name that no other had before, since the guest may remember the files of
//! a predecessor for a moment.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use sandbox_protocol::{MEMORY_MOUNT, MemoryVolume, RootWrites, SHARE_MOUNT};
use sandbox_vmm_api::ShareEntry;

use super::memory_volume::HostMounts;
use super::validate::is_bind;
use super::{Bundle, Role, SpecError, cgroup_mounts, id_maps, memory_volume};
use crate::state::SandboxId;
use crate::{hooks, network};

/// Where a container finds POSIX shared memory, and where the guest has that of a pod.
const SHARED_MEMORY: &str = "/dev/shm";

/// A configuration as the guest gets it.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The configuration, its paths those of the guest.
    pub spec: Spec,
    /// What the machine shares for it.
    pub shares: Vec<ShareEntry>,
    /// What it gets in the guest's memory.
    pub volumes: Vec<MemoryVolume>,
    /// Where writes to the root file system go.
    pub root: RootWrites,
}

impl GuestSpec {
    /// Turns a bundle into what the guest gets.
    ///
    /// `wanted` is where the user wants writes to the root to go. A read-only root is shared read-only and gets
    /// an overlay all the same, in which the agent can make the places of mounts that the root lacks.
    pub fn of(bundle: &Bundle, id: &SandboxId, wanted: RootWrites) -> Result<Self, SpecError> {
        let mut spec = bundle.spec().clone();
        cgroup_mounts::replace(&mut spec, bundle.path());
        let readonly = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let root = if readonly { RootWrites::Overlay } else { wanted };
        let role = Role::of(&spec)?;
        let top = match role {
            Role::Alone | Role::Sandbox => PathBuf::from(id.as_str()),
            Role::Member(_) => PathBuf::from(format!("{id}+{}", SandboxId::random())),
        };
        let mut shares = vec![ShareEntry {
            path: top.join("rootfs"),
            source: bundle.root().into(),
            read_only: root == RootWrites::Overlay,
            id_map: None,
        }];
        if let Some(root) = spec.root_mut() {
            root.set_path(in_guest(&shares[0]));
        }
        let mut volumes = Vec::new();
        // Only those of a pod are looked for among them.
        let mounts = if role == Role::Alone { HostMounts::default() } else { HostMounts::read() };
        for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate().filter(|(_, m)| is_bind(m)) {
            if role != Role::Alone && is_shared_memory(mount) {
                mount.set_source(Some(SHARED_MEMORY.into()));
                continue;
            }
            if role != Role::Alone
                && let Some((volume, path)) = memory_volume::of(mount, bundle, &mounts)
            {
                mount.set_source(Some(Path::new(MEMORY_MOUNT).join(&volume.name).join(path)));
                volumes.push(volume);
                continue;
            }
            let mut share = share_of(bundle.path(), &top, index, mount)?;
            share.id_map = id_maps::take(mount, bundle.spec().linux().as_ref());
            mount.set_source(Some(in_guest(&share)));
            shares.push(share);
        }
        // The guest has no use for what is meant for engines, and the host's names are none of its business.
        spec.set_annotations(None);
        if !matches!(role, Role::Member(_)) {
            network::Wanted::in_guest(&mut spec);
        }
        spec.set_hooks(hooks::for_guest(spec.hooks().as_ref()));
        Ok(Self { spec, shares, volumes, root })
    }
}

/// Whether a mount is the shared memory that an engine made for a pod: a file system in memory, called `shm`. Through
/// the share, each container would have memory of its own there; so they get the guest's.
fn is_shared_memory(mount: &Mount) -> bool {
    let Some(source) = mount.source().as_ref().filter(|source| source.ends_with("shm")) else { return false };
    let in_memory = rustix::fs::statfs(source).is_ok_and(|fs| fs.f_type == libc::TMPFS_MAGIC);
    mount.destination() == Path::new(SHARED_MEMORY) && in_memory
}

fn in_guest(share: &ShareEntry) -> PathBuf {
    Path::new(SHARE_MOUNT).join(&share.path)
}

fn share_of(bundle: &Path, top: &Path, index: usize, mount: &Mount) -> Result<ShareEntry, SpecError> {
    let source = mount.source().clone().unwrap_or_default();
    let error = |why: String| SpecError::MountSource { index, path: source.clone(), why };
    if source.as_os_str().is_empty() {
        return Err(error("it is missing".into()));
    }
    let real = bundle.join(&source).canonicalize().map_err(|e| error(format!("cannot be used: {e}")))?;
    let kind = fs::metadata(&real).map_err(|e| error(format!("cannot be used: {e}")))?.file_type();
    if !kind.is_dir() && !kind.is_file() {
        let why = "is neither a directory nor a regular file: sockets, pipes and devices of the host do not work in \
                   a virtual machine";
        return Err(error(why.into()));
    }
    let path = top.join("mounts").join(index.to_string());
    Ok(ShareEntry { path, source: real, read_only: is_read_only(mount), id_map: None })
}

/// Whether a mount's options say so. The last word counts, as in mount(8).
pub fn is_read_only(mount: &Mount) -> bool {
    let options = mount.options().iter().flatten();
    options.fold(false, |read_only, option| match option.as_str() {
        "ro" | "rro" => true,
        "rw" | "rrw" => false,
        _ => read_only,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::spec::Overrides;

    struct Case {
        bundle: tempfile::TempDir,
    }

    impl Case {
        fn new(root: Value, mounts: Value) -> Self {
            let bundle = tempfile::tempdir().unwrap();
            fs::create_dir(bundle.path().join("rootfs")).unwrap();
            fs::create_dir(bundle.path().join("data")).unwrap();
            fs::write(bundle.path().join("file"), "").unwrap();
            let config = json!({"ociVersion": "1.2.0", "root": root, "mounts": mounts,
                "annotations": {"a": "b"}, "process": {"cwd": "/", "args": ["sh"]}});
            fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
            Self { bundle }
        }

        fn guest(&self, wanted: RootWrites) -> Result<GuestSpec, SpecError> {
            let bundle = Bundle::load(self.bundle.path(), &Overrides::default())?;
            GuestSpec::of(&bundle, &"box".parse().unwrap(), wanted)
        }
    }

    #[test]
    fn the_root_is_writable_only_where_writes_go_through() {
        for (readonly, wanted, root) in [
            (false, RootWrites::Overlay, RootWrites::Overlay),
            (false, RootWrites::Through, RootWrites::Through),
            (true, RootWrites::Overlay, RootWrites::Overlay),
            (true, RootWrites::Through, RootWrites::Overlay),
        ] {
            let case = Case::new(json!({"path": "rootfs", "readonly": readonly}), json!([]));
            let guest = case.guest(wanted).unwrap();
            assert_eq!(guest.root, root);
            assert_eq!(guest.shares[0].read_only, root == RootWrites::Overlay);
        }
    }

    #[test]
    fn host_paths_become_guest_paths() {
        let case = Case::new(
            json!({"path": "rootfs"}),
            json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "source": "data", "options": ["rbind", "ro"]},
                {"destination": "/file", "type": "bind", "source": "file", "options": ["ro", "rw"]},
            ]),
        );
        let guest = case.guest(RootWrites::Overlay).unwrap();
        assert_eq!(guest.spec.root().as_ref().unwrap().path(), Path::new("/run/sandbox/share/box/rootfs"));
        let mounts = guest.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        assert_eq!(mounts[1].source().as_deref(), Some(Path::new("/run/sandbox/share/box/mounts/1")));
        let host = case.bundle.path().canonicalize().unwrap();
        let share = |path: &str, source: &str, read_only| ShareEntry {
            path: path.into(),
            source: host.join(source),
            read_only,
            id_map: None,
        };
        assert_eq!(
            guest.shares,
            [
                share("box/rootfs", "rootfs", true),
                share("box/mounts/1", "data", true),
                share("box/mounts/2", "file", false)
            ]
        );
        assert_eq!(guest.spec.annotations(), &None);
    }

    #[test]
    fn bad_sources_are_named() {
        for (source, wanted) in [
            (json!("nowhere"), "cannot be used: No such file"),
            (json!("/dev/null"), "neither a directory nor a regular file"),
            (json!(null), "it is missing"),
        ] {
            let mounts = json!([{"destination": "/a", "type": "bind", "source": source}]);
            let message =
                Case::new(json!({"path": "rootfs"}), mounts).guest(RootWrites::Overlay).unwrap_err();
            let message = message.to_string();
            assert!(message.contains("`mounts[0].source`") && message.contains(wanted), "{message}");
        }
    }
}
