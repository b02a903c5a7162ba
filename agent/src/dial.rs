//! Connections to the host: only the guest dials.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// The host's vsock address.
const HOST_CID: u32 = 2;

/// How the host is reached.
#[derive(Clone, Debug)]
pub enum Dialer {
    /// Over vsock.
    Vsock,
    /// At unix sockets whose paths are this one, `_` and the port.
    Unix(PathBuf),
}

/// The host could not be dialled.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to the host's port {port}: {source}")]
pub struct DialError {
    port: u32,
    source: std::io::Error,
}

impl Dialer {
    /// Connects to a port of the host. The connection is blocking and closed on exec.
    pub fn dial(&self, port: u32) -> Result<OwnedFd, DialError> {
        match self {
            Self::Vsock => dial_vsock(port).map_err(std::io::Error::from),
            Self::Unix(path) => {
                let mut path = path.clone().into_os_string();
                path.push(format!("_{port}"));
                UnixStream::connect(PathBuf::from(path)).map(OwnedFd::from)
            }
        }
        .map_err(|source| DialError { port, source })
    }
}

fn dial_vsock(port: u32) -> nix::Result<OwnedFd> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    Ok(stream)
}
