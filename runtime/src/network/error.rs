//! Why a sandbox cannot have its network.

use std::io;
use std::path::PathBuf;

/// Why a sandbox cannot have the network of a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is nothing at the path, or it cannot be opened.
    #[error(
        "the network namespace {} of linux.namespaces cannot be opened: {error}; whoever made it must keep it until \
         the container is deleted", path.display()
    )]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// There is something else at the path.
    #[error("linux.namespaces has type `network` for {}, which is no network namespace: {error}", path.display())]
    Enter {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is that of the runtime.
    #[error(
        "{} of linux.namespaces is the host's own network, which cannot be given to a virtual machine: ask the engine \
         for a network of the container's own, or for --network none", .0.display()
    )]
    Host(PathBuf),
    /// Another sandbox is there already.
    #[error(
        "the network namespace {namespace} has another sandbox in it ({owner}): an interface leads into one virtual \
         machine, so containers of different sandboxes cannot share a network namespace"
    )]
    InUse {
        /// The namespace.
        namespace: String,
        /// What its tap says of it.
        owner: String,
    },
    /// There are more interfaces than a machine has room for.
    #[error(
        "the network namespace {namespace} has {count} interfaces, and the virtual machine has room for {most}"
    )]
    TooMany {
        /// The namespace.
        namespace: String,
        /// How many it has.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// Something in it has no counterpart in the guest.
    #[error(
        "the network namespace {namespace} has {what}, which a virtual machine cannot be given: remove it"
    )]
    Unsupported {
        /// The namespace.
        namespace: String,
        /// What.
        what: String,
    },
    /// An interface could not be joined with its tap.
    #[error(
        "cannot redirect the traffic of {interface} in the network namespace {namespace}: {error}; the host's kernel \
         needs sch_ingress, cls_u32 and act_mirred"
    )]
    Redirect {
        /// The namespace.
        namespace: String,
        /// The interface.
        interface: String,
        /// Why.
        error: io::Error,
    },
    /// Anything else.
    #[error("the network namespace {namespace} cannot {what}: {error}")]
    Step {
        /// The namespace.
        namespace: String,
        /// What it was to do.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
}

impl NetworkError {
    pub(super) fn step(namespace: &str, what: &'static str, error: io::Error) -> Self {
        Self::Step { namespace: namespace.to_owned(), what, error }
    }
}
