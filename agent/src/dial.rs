//! Connections to the host: only the guest dials.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::errno::Errno;
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

/// A connection that the host has been asked for.
#[derive(Debug)]
pub struct Dialling {
    socket: OwnedFd,
    port: u32,
    /// Whether the host has not answered yet.
    waits: bool,
}

impl Dialer {
    /// Connects to a port of the host. The connection is blocking and closed on exec.
    pub fn dial(&self, port: u32) -> Result<OwnedFd, DialError> {
        self.begin(port)?.finish()
    }

    /// Asks for a connection to a port of the host, and does not wait for the answer.
    pub fn begin(&self, port: u32) -> Result<Dialling, DialError> {
        let begun = match self {
            Self::Vsock => begin_vsock(port).map(|socket| (socket, true)).map_err(std::io::Error::from),
            Self::Unix(path) => {
                let mut path = path.clone().into_os_string();
                path.push(format!("_{port}"));
                UnixStream::connect(PathBuf::from(path)).map(|stream| (stream.into(), false))
            }
        };
        let (socket, waits) = begun.map_err(|source| DialError { port, source })?;
        Ok(Dialling { socket, port, waits })
    }
}

impl Dialling {
    /// Waits for the answer. The connection is blocking and closed on exec.
    pub fn finish(self) -> Result<OwnedFd, DialError> {
        let Self { socket, port, waits } = self;
        if waits {
            finish_vsock(&socket, port).map_err(|error| DialError { port, source: error.into() })?;
        }
        Ok(socket)
    }
}

fn begin_vsock(port: u32) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// Connects once more, which of a vsock that connects already is to wait for it.
fn finish_vsock(socket: &OwnedFd, port: u32) -> nix::Result<()> {
    rustix::io::ioctl_fionbio(socket, false).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
        Ok(()) | Err(Errno::EISCONN) => Ok(()),
        Err(error) => Err(error),
    }
}
