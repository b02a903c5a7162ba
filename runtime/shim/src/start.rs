//! `start`: containerd wants to know where the shim of a container listens.
//!
//! The containers of a pod have one shim, known by the pod. It is started for the first of them, and found for the
//! others. The socket is made here and handed on, so that it can be connected to when containerd reads its address.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::{self, Message};
use sandbox_runtime::descriptor::{self, Ties};

use crate::flags::Flags;
use crate::place::{self, PlaceError};
use crate::serve::LISTENER_FD;

/// Where containerd takes events, in the environment.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// How large the stacks of its threads are: less than a huge page, which a kernel would give whole to a stack of 2 MiB.
const MIN_STACK: &str = "RUST_MIN_STACK";
const STACK_BYTES: &str = "1048576";

/// The most bytes that containerd may say on standard input, and of a configuration.
const MAX_INPUT_BYTES: u64 = 10 << 20;

/// The pod that a container belongs to.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Why no shim was started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The environment.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The container's configuration.
    #[error("cannot read {}: {error}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The name of the pod leads elsewhere.
    #[error("the annotation {SANDBOX_ID} of config.json: {0:?} is not the id of a pod")]
    Group(String),
    /// Something on our side.
    #[error("cannot {step}: {error}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// What containerd says makes no sense.
    #[error("containerd's parameters make no sense: {0}")]
    Protocol(#[from] protobuf::Error),
}

/// Starts a shim, or finds it. Returns what containerd is answered.
pub fn start(flags: &Flags) -> Result<Vec<u8>, StartError> {
    let host = |step| move |error| StartError::Host { step, error };
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT_BYTES).read_to_end(&mut input).map_err(host("read what containerd says"))?;
    let parameters = parameters(&input, flags);
    let place = place::of(&flags.namespace, flags.debug)?;
    let bundle = flags.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let group = group(&bundle, &flags.id)?;
    let socket = place::socket(&place.root, &group);
    {
        let _lock = place::lock(&place.root)?;
        place::sweep(&place.root);
        if UnixStream::connect(&socket).is_err() {
            // Nobody listens there.
            let _ = std::fs::remove_file(&socket);
            let listener = UnixListener::bind(&socket).map_err(host("listen for containerd"))?;
            let events = parameters.as_ref().map(|parameters| parameters.containerd_ttrpc_address.as_str());
            spawn(&listener, &group, flags, &bundle, events).map_err(host("start the shim"))?;
        }
    }
    let address = format!("unix://{}", socket.display());
    place::note_address(&bundle, &address).map_err(host("write the address"))?;
    match parameters {
        None => Ok(address.into_bytes()),
        Some(_) => {
            let version = containerd_shim_protos::TASK_API_VERSION;
            let protocol = "ttrpc".into();
            Ok(BootstrapResult { version, address, protocol, ..BootstrapResult::default() }
                .write_to_bytes()?)
        }
    }
}

/// What a containerd of version 2.3 or later says. `None`: this is an earlier one, which says all of it in flags and in
/// the environment; its standard input has the options of the runtime, which come again with the container.
fn parameters(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let parameters = BootstrapParams::parse_from_bytes(input).ok()?;
    (parameters.instance_id == flags.id && parameters.namespace == flags.namespace).then_some(parameters)
}

/// The pod of a container, or the container itself.
fn group(bundle: &Path, id: &str) -> Result<String, StartError> {
    let path = bundle.join("config.json");
    let read = || {
        let mut text = Vec::new();
        match File::open(&path) {
            Ok(file) => file.take(MAX_INPUT_BYTES).read_to_end(&mut text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        match text.is_empty() {
            // The pod of the sandbox API: a sandbox has no configuration of this kind.
            true => Ok(serde_json::Value::Null),
            false => Ok(serde_json::from_slice::<serde_json::Value>(&text)?),
        }
    };
    let config = read().map_err(|error| StartError::Config { path: path.clone(), error })?;
    let group = config["annotations"][SANDBOX_ID].as_str().unwrap_or(id);
    match group.is_empty() || group.starts_with('.') || group.contains('/') {
        true => Err(StartError::Group(group.into())),
        false => Ok(group.into()),
    }
}

fn spawn(
    listener: &UnixListener,
    group: &str,
    flags: &Flags,
    bundle: &Path,
    events: Option<&str>,
) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    // What administrators look for.
    command.arg0("containerd-shim-sandbox-v2").env(MIN_STACK, STACK_BYTES);
    command.args(["-namespace", &flags.namespace, "-id", group]);
    if flags.debug {
        command.arg("-debug");
    }
    command.arg("serve").current_dir(bundle);
    if let Some(events) = events {
        command.env(TTRPC_ADDRESS, events);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    descriptor::give(&mut command, &[(listener.as_fd(), LISTENER_FD)], Ties::None)?;
    // Nobody here waits for it: it outlives this process, and is somebody else's child then.
    command.spawn().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::Action;

    #[test]
    fn a_containers_group_is_its_pod() {
        let dir = tempfile::tempdir().unwrap();
        let with = |config: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            group(dir.path(), "c1")
        };
        assert_eq!(group(dir.path(), "c1").unwrap(), "c1");
        assert_eq!(with("").unwrap(), "c1");
        assert_eq!(with("{}").unwrap(), "c1");
        assert_eq!(with(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p1"}}"#).unwrap(), "p1");
        assert!(with(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../p"}}"#).is_err());
        assert!(with("nonsense").is_err());
    }

    #[test]
    fn the_new_parameters_are_told_from_the_old_options() {
        let flags = Flags {
            action: Action::Start,
            namespace: "ns".into(),
            id: "c1".into(),
            bundle: None,
            debug: false,
        };
        let mut new =
            BootstrapParams { instance_id: "c1".into(), namespace: "ns".into(), ..Default::default() };
        assert!(parameters(&new.write_to_bytes().unwrap(), &flags).is_some());
        new.instance_id = "containerd.runc.v1.Options".into();
        assert!(parameters(&new.write_to_bytes().unwrap(), &flags).is_none());
        assert!(parameters(b"", &flags).is_none());
    }
}
