//! Where things are on the host: the state of a namespace's containers, the sockets of its shims, and what the
//! operator's configuration and the environment say about the machine.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use sandbox_runtime::cgroup::Manager;
use sandbox_runtime::config::{Config, ConfigError};
use sandbox_runtime::lifecycle::Place;
use sandbox_runtime::state::{NAMESPACE_MARK, default_root};
use sandbox_vmm_api::MachineChoice;

/// The state root, above the directories of namespaces.
const ROOT: &str = "SANDBOX_ROOT";

/// The machine, as `sandbox --machine` takes it.
const MACHINE: &str = "SANDBOX_MACHINE";

/// Why the environment is of no use.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The namespace cannot be part of a path.
    #[error("the namespace {0:?} cannot be the name of a directory")]
    Namespace(String),
    /// The directory cannot be had.
    #[error("cannot {step} the state directory {}: {error}", path.display())]
    Directory {
        /// What was being done.
        step: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The operator's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The machine does not exist.
    #[error("{MACHINE}: {0:?} is no machine: write kvm, qemu or auto, or leave it out")]
    Machine(String),
}

/// Where the containers of a namespace have their state. Two namespaces may have containers of the same name, so each
/// has a root of its own, with a name that no sandbox of the command line can have.
pub fn of(namespace: &str, debug: bool) -> Result<Place, PlaceError> {
    if namespace.is_empty() || namespace.contains(['/', '\0']) {
        return Err(PlaceError::Namespace(namespace.into()));
    }
    let config = Config::load(None)?;
    let named = std::env::var_os(ROOT).map(PathBuf::from).or_else(|| config.root.clone());
    let root = named.unwrap_or_else(default_root).join(format!("{NAMESPACE_MARK}{namespace}"));
    Ok(Place { root, cgroups: Manager::Cgroupfs, debug, config })
}

/// The machine that the environment asks for, if it does.
pub fn machine() -> Result<Option<MachineChoice>, PlaceError> {
    match std::env::var(MACHINE).unwrap_or_default().as_str() {
        "" => Ok(None),
        "auto" => Ok(Some(MachineChoice::Auto)),
        "kvm" => Ok(Some(MachineChoice::Kvm)),
        "qemu" => Ok(Some(MachineChoice::Qemu)),
        other => Err(PlaceError::Machine(other.into())),
    }
}

/// Where a containerd of version 1 looks for the address of a shim when it is started again: a file of the bundle.
const ADDRESS_FILE: &str = "address";

/// Notes the address of a container's shim in its bundle.
pub fn note_address(bundle: &Path, address: &str) -> io::Result<()> {
    std::fs::write(bundle.join(ADDRESS_FILE), address)
}

/// Notes that a container has the same shim as the one of another bundle.
pub fn note_same_address(bundle: &Path, other: &Path) -> io::Result<()> {
    std::fs::copy(other.join(ADDRESS_FILE), bundle.join(ADDRESS_FILE)).map(drop)
}

/// The root of a container's state, by that address. The configuration may have changed since, or be wrong by now, and
/// what is left is to be found all the same.
pub fn root_of(bundle: &Path) -> Option<PathBuf> {
    let address = std::fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    let root = Path::new(address.strip_prefix("unix://")?).parent()?;
    root.is_absolute().then(|| root.to_owned())
}

/// How the name of a shim's socket ends.
const SOCKET: &str = ".shim";

/// The socket of the shim of a pod, or of a container without one.
pub fn socket(root: &Path, group: &str) -> PathBuf {
    root.join(format!("{group}{SOCKET}"))
}

/// Removes the sockets that nobody listens on: their shims were killed before containerd knew of them. The caller has
/// the lock of the root.
pub fn sweep(root: &Path) {
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_socket = entry.file_name().to_string_lossy().ends_with(SOCKET);
        if is_socket
            && UnixStream::connect(&path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Makes the root, and has it for oneself until the lock is dropped: who finds a shim or starts one must not meet
/// somebody else who does.
pub fn lock(root: &Path) -> Result<File, PlaceError> {
    let error = |step| move |error| PlaceError::Directory { step, path: root.into(), error };
    loop {
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(error("make"))?;
        let directory = match File::open(root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            directory => directory.map_err(error("open"))?,
        };
        rustix::fs::flock(&directory, FlockOperation::LockExclusive).map_err(|e| error("lock")(e.into()))?;
        // The last shim removes the directory, and somebody may have waited for the lock of one that is gone.
        let held = directory.metadata().map_err(error("look at"))?;
        match std::fs::metadata(root) {
            Ok(named) if (named.dev(), named.ino()) == (held.dev(), held.ino()) => return Ok(directory),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sandbox_runtime::state::SandboxId;

    #[test]
    fn the_root_is_found_by_the_address() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(root_of(bundle.path()), None);
        let socket = socket(Path::new("/run/other/@ns"), "pod");
        note_address(bundle.path(), &format!("unix://{}", socket.display())).unwrap();
        assert_eq!(root_of(bundle.path()).as_deref(), Some(Path::new("/run/other/@ns")));
    }

    #[test]
    fn sockets_that_nobody_listens_on_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(socket(root.path(), "lives")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(socket(root.path(), "dead")).unwrap());
        std::fs::write(root.path().join("file"), "").unwrap();
        sweep(root.path());
        let mut left: Vec<_> =
            std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["file", "lives.shim"]);
        drop(listener);
    }

    #[test]
    fn a_namespace_has_a_root_that_is_no_sandbox() {
        let place = of("k8s.io", false).unwrap();
        let name = place.root.file_name().unwrap().to_str().unwrap();
        assert_eq!(name, "@k8s.io");
        assert!(name.parse::<SandboxId>().is_err());
        for bad in ["", "a/b", "\0"] {
            assert!(of(bad, false).is_err(), "{bad:?}");
        }
    }
}
