//! The agent in the guest, as the host meets it: a peer that may lie.
//!
//! Only the guest dials. What arrives is read with the bounds of the protocol and becomes events; whatever is
//! against the protocol ends the connection, and with it the sandbox.

mod calls;
mod control;
mod door;

pub use calls::{Calls, CallsError};
pub use control::listen_for_agent;
pub use door::listen_for_streams;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use sandbox_vmm_api::socket;

/// A socket that is listened on by a thread; dropping it ends both.
#[derive(Debug)]
pub struct Listening(UnixListener);

impl Listening {
    /// Makes the socket. The second is for the thread.
    fn on(path: &Path) -> Result<(Self, UnixListener), ListenError> {
        let error = |error| ListenError { path: path.into(), error };
        let listener = socket::bind(path).map_err(error)?;
        Ok((Self(listener.try_clone().map_err(error)?), listener))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Wakes the thread, whose `accept` fails.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

/// Why the guest cannot be listened for.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for the guest on {}: {error}", path.display())]
pub struct ListenError {
    path: PathBuf,
    error: io::Error,
}
