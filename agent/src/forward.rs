//! Connections into the guest's own network that the host asks for: where `kubectl port-forward` leads.
//!
//! ```text
//!   host ──connect PORT──► agent ──► 127.0.0.1:PORT, or else [::1]:PORT
//!        ◄══ a stream, dialled once that stands, and its bytes both ways ══►
//! ```
//!
//! A service may take its time to accept, so connecting is not waited for: the loop goes on meanwhile.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use sandbox_protocol::{Failure, Outcome, Stream};

use crate::requests::other;
use crate::serve::{Agent, ServeError};
use crate::stdio::{self, Line, Owner, StdioError};
use crate::stream::{Progress, Sink};

/// The most connections at once, more than the host asks for.
const MAX_CONNECTIONS: usize = 256;

/// Where a service that is meant for the pod itself may listen.
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// All of them.
#[derive(Debug, Default)]
pub struct Forwards {
    dialling: BTreeMap<u64, Dialling>,
    /// The pumps of those that stand, one for each direction, each with the other.
    pumps: BTreeMap<u64, u64>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    request: u64,
    port: u16,
    connection: u64,
}

/// A connection that does not stand yet.
#[derive(Debug)]
struct Dialling {
    wanted: Wanted,
    socket: OwnedFd,
    /// Where to try next.
    others: &'static [IpAddr],
}

impl Agent {
    /// Connects to a port of the guest. The request is answered when that has come to something.
    pub(crate) fn connect_to(&mut self, request: u64, port: u16, connection: u64) -> Result<(), Failure> {
        if self.forwards.dialling.len() + self.forwards.pumps.len() / 2 >= MAX_CONNECTIONS {
            return Err(other(format!(
                "the agent carries {MAX_CONNECTIONS} connections, which is its limit"
            )));
        }
        self.dial_port(Wanted { request, port, connection }, &ADDRESSES, Errno::CONNREFUSED)
    }

    /// Dials the first of these addresses that can be dialled. `why` is what is said if there is none.
    fn dial_port(&mut self, wanted: Wanted, addresses: &'static [IpAddr], why: Errno) -> Result<(), Failure> {
        for (index, address) in addresses.iter().enumerate() {
            let Ok(socket) = begin(SocketAddr::new(*address, wanted.port)) else { continue };
            let number = self.number();
            self.watch_dial(number, &socket).map_err(other)?;
            let others = addresses.get(index + 1..).unwrap_or_default();
            self.forwards.dialling.insert(number, Dialling { wanted, socket, others });
            return Ok(());
        }
        Err(other(format!("cannot connect to port {} of the guest: {why}", wanted.port)))
    }

    /// A connection stands, or cannot be had at this address.
    pub(crate) fn dialled(&mut self, number: u64) -> Result<(), ServeError> {
        let Some(Dialling { wanted, socket, others }) = self.forwards.dialling.remove(&number) else {
            return Ok(());
        };
        self.stop_dial(&socket);
        let outcome = match rustix::net::sockopt::socket_error(&socket).and_then(|connected| connected) {
            Ok(()) => self.carry_connection(wanted, &socket)?.map_err(other),
            Err(why) => match self.dial_port(wanted, others, why) {
                Ok(()) => return Ok(()),
                Err(failure) => Err(failure),
            },
        };
        self.reply(wanted.request, outcome.map_or_else(Outcome::Failed, |()| Outcome::Done))
    }

    /// Dials the host for a connection that stands, and carries its bytes from now on.
    fn carry_connection(
        &mut self,
        wanted: Wanted,
        socket: &OwnedFd,
    ) -> Result<Result<(), StdioError>, ServeError> {
        let name = wanted.connection.to_string();
        let owner = Owner { container: "", process: &name, secret: &self.stream_secret };
        let pumps = Line::of(&self.dialer, owner, Stream::Connection)
            .dial()
            .and_then(|connection| stdio::carry_both_ways(connection, socket, Sink::Connection));
        let [to, from] = match pumps {
            Ok(pumps) => pumps,
            Err(error) => return Ok(Err(error)),
        };
        let (to, from) = (self.start_pump(to)?, self.start_pump(from)?);
        self.forwards.pumps.extend([(to, from), (from, to)]);
        Ok(Ok(()))
    }

    /// A stream has ended: of a connection, one direction. If it broke, so has the other.
    pub(crate) fn forward_ended(&mut self, pump: u64, how: Progress) {
        let Some(other) = self.forwards.pumps.get(&pump).copied() else { return };
        if how == Progress::Broken {
            self.stop_pump(other);
        }
        if !self.has_pump(other) {
            self.forwards.pumps.remove(&pump);
            self.forwards.pumps.remove(&other);
        }
    }
}

/// Begins to connect.
fn begin(address: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}
