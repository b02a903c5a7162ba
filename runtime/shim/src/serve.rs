//! A shim: the process that serves the containers of a pod until the last of them is gone.

use std::io;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::Arc;

use containerd_shim_protos::create_task;
use containerd_shim_protos::sandbox_sync::create_sandbox;
use containerd_shim_protos::ttrpc::{self, Server};
use sandbox_runtime::descriptor;

use crate::container::Shared;
use crate::events::Events;
use crate::flags::Flags;
use crate::over::Over;
use crate::place::{self, PlaceError};
use crate::sandbox::Pod;
use crate::service::Service;
use crate::{log, sandbox, start};

/// Where it finds the socket that it is to listen on.
pub const LISTENER_FD: RawFd = 3;

/// The names of the task service: of containerd 1, which 2 knows as well, and of containerd 2, which differs in the name
/// alone.
const V2: &str = "containerd.task.v2.Task";
const V3: &str = "containerd.task.v3.Task";

/// Why a shim could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It was not started by `start`.
    #[error("this is for `start` to start: {0}")]
    NotOurs(io::Error),
    /// The environment.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Events cannot be sent.
    #[error("cannot send events: {0}")]
    Events(io::Error),
    /// The service cannot be served.
    #[error("cannot serve: {0}")]
    Server(#[from] ttrpc::Error),
}

/// Serves the containers of a pod.
pub fn serve(flags: &Flags) -> Result<(), ServeError> {
    let listener = descriptor::take(LISTENER_FD).map_err(ServeError::NotOurs)?;
    descriptor::keep_from_children();
    log::open(&flags.namespace, &flags.id);
    let place = place::of(&flags.namespace, flags.debug)?;
    let root = place.root.clone();
    let address = std::env::var(start::TTRPC_ADDRESS).unwrap_or_default();
    let events = Events::to(address, &flags.namespace).map_err(ServeError::Events)?;
    let shared = Arc::new(Shared { namespace: flags.namespace.clone(), place, events });
    let over = Arc::new(Over::default());
    let unheard = Shared {
        namespace: shared.namespace.clone(),
        place: shared.place.clone(),
        events: Events::to_nobody(),
    };
    let pod = Arc::new(Pod::new(Arc::new(unheard)));
    let service = Arc::new(Service::new(Arc::clone(&shared), Arc::clone(&pod), Arc::clone(&over)));
    let done = Arc::clone(&over);
    let sandbox =
        create_sandbox(Arc::new(sandbox::Service::new(pod, move |connection| done.tell(connection))));
    let methods = create_task(service.clone());
    let renamed = create_task(service);
    let renamed = renamed.into_iter().map(|(path, method)| (path.replace(V3, V2), method)).collect();
    let mut server = Server::new()
        .add_listener(listener.into_raw_fd())?
        .register_service(over.count(methods))
        .register_service(over.count(sandbox))
        .register_service(over.count(renamed));
    server.start()?;
    over.wait();
    {
        // Nobody is to find a shim that is about to end.
        let _lock = place::lock(&root)?;
        let _ = std::fs::remove_file(place::socket(&root, &flags.id));
    }
    shared.events.finish();
    let _ = std::fs::remove_dir(&root);
    over.wait_for_hangup();
    Ok(())
}
