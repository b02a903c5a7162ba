//! The loopback of a pod's namespace on the host, which leads into the guest.
//!
//! `kubectl port-forward` has the engine enter the pod's network namespace and dial a port at 127.0.0.1 or ::1, but the
//! pod's services listen in the guest. So one socket of ours takes whatever is dialled there, and somebody else carries it
//! on. What is dialled at the namespace's other addresses is no affair of it.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::{io, net};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::namespace::Namespace;
use super::{NetworkError, steering};
use crate::thread;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 64;

/// The loopback of a namespace. Dropping it leaves it to the kernel again.
#[derive(Debug)]
pub struct Loopback {
    listener: TcpListener,
    _steering: OwnedFd,
}

impl Loopback {
    /// Takes what is dialled at loopback addresses of the namespace at a path from now on.
    pub fn take(path: &Path) -> Result<Self, NetworkError> {
        let namespace = Namespace::open(path)?;
        let take = || {
            let listener = listen()?;
            let steering = steering::steer(namespace.as_fd(), listener.as_fd())?;
            Ok(Self { listener, _steering: steering })
        };
        namespace.within(take)?.map_err(|error| {
            NetworkError::step(&path.display().to_string(), "have its loopback lead into the guest", error)
        })
    }

    /// Hands over each connection with the port that was dialled, in a thread of its own, until that returns `false` or
    /// the loopback is dropped.
    pub fn serve(&self, dialled: impl Fn(u16, TcpStream) -> bool + Send + 'static) -> io::Result<()> {
        let listener = self.listener.try_clone()?;
        let body = move || {
            loop {
                match listener.accept() {
                    Ok((connection, _)) => {
                        let Ok(address) = connection.local_addr() else { continue };
                        if !dialled(address.port(), connection) {
                            return;
                        }
                    }
                    // Who dialled has gone again.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(_) => return,
                }
            }
        };
        thread::spawn("loopback", body).map(drop)
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        // Wakes the thread, whose `accept` fails.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// A socket for both protocols where there are both. Nobody needs its port.
fn listen() -> io::Result<TcpListener> {
    let listen = |address: SocketAddr| -> io::Result<TcpListener> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket.into())
    };
    let any = SocketAddr::from((net::Ipv6Addr::UNSPECIFIED, 0));
    listen(any).or_else(|_| listen((net::Ipv4Addr::LOCALHOST, 0).into()))
}
