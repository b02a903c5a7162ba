//! A socket that a thread listens on, as long as its owner wants.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use sandbox_vmm_api::socket;

/// A socket that is listened on by a thread; dropping it ends both.
#[derive(Debug)]
pub struct Listening(UnixListener);

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}: {error}", path.display())]
pub struct ListenError {
    path: PathBuf,
    error: io::Error,
}

impl Listening {
    /// Makes the socket. The second is for the thread.
    pub fn on(path: &Path) -> Result<(Self, UnixListener), ListenError> {
        let error = ListenError::at(path);
        let listener = socket::bind(path).map_err(&error)?;
        Ok((Self(listener.try_clone().map_err(&error)?), listener))
    }
}

impl ListenError {
    /// The error for a socket.
    pub fn at(path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| Self { path: path.into(), error }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Wakes the thread, whose `accept` fails.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}
