//! Connections from the host into the guest, to ports of its loopback.
//!
//! ```text
//!   dialled ──► waiting ──connect──► asked ──the guest's stream──► carried, by two threads, to its end
//!                                      └── it has failed: reset
//! ```
//!
//! Only the guest dials, so it is asked to, with a number by which its stream is known.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufReader};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use sandbox_protocol::{Call, Outcome};

use super::ready::{Asked, Ready};
use super::{Error, Event, Sender};
use crate::network::Loopback;
use crate::thread;

/// How many connections there may be, in whatever state. Each takes two threads.
const MAX_CONNECTIONS: usize = 128;

/// How many the guest may be asked for at a time, so that others' requests find room.
const MAX_ASKED: usize = 8;

/// How much is carried at once.
const BUFFER_BYTES: usize = 64 << 10;

/// All of them.
#[derive(Debug)]
pub struct Forwards {
    _loopback: Option<Loopback>,
    waiting: VecDeque<(u16, TcpStream)>,
    /// Those whose stream has not come, by their numbers.
    asked: BTreeMap<u64, TcpStream>,
    unanswered: usize,
    last_number: u64,
    /// Held by the two threads of each that is carried.
    carried: Arc<()>,
}

impl Forwards {
    /// None so far; what is dialled at this loopback is going to be.
    pub fn of(loopback: Option<Loopback>, sender: Sender) -> io::Result<Self> {
        if let Some(loopback) = &loopback {
            loopback.serve(move |port, connection| sender.send(Event::Dialled(port, connection)).is_ok())?;
        }
        Ok(Self {
            _loopback: loopback,
            waiting: VecDeque::new(),
            asked: BTreeMap::new(),
            unanswered: 0,
            last_number: 0,
            carried: Arc::default(),
        })
    }

    fn count(&self) -> usize {
        self.waiting.len() + self.asked.len() + Arc::strong_count(&self.carried) / 2
    }

    /// The next one that the guest is to be asked for, with its number.
    fn next(&mut self) -> Option<(u16, u64)> {
        if self.unanswered >= MAX_ASKED {
            return None;
        }
        let (port, connection) = self.waiting.pop_front()?;
        self.last_number += 1;
        self.unanswered += 1;
        self.asked.insert(self.last_number, connection);
        Some((port, self.last_number))
    }

    /// Takes a stream of the guest. `false`: it is not expected, and was closed.
    pub fn opened(&mut self, number: &str, stream: UnixStream) -> io::Result<bool> {
        let asked = number.parse().ok().and_then(|number: u64| self.asked.remove(&number));
        let Some(connection) = asked else { return Ok(false) };
        carry(connection, stream, &self.carried)?;
        Ok(true)
    }
}

impl Ready<'_> {
    /// Somebody on the host has dialled a port of the guest.
    pub(super) fn dialled(&mut self, port: u16, connection: TcpStream) -> Result<(), Error> {
        if self.forwards.count() >= MAX_CONNECTIONS {
            reset(&connection);
            return Ok(());
        }
        self.forwards.waiting.push_back((port, connection));
        self.ask_for_connections()
    }

    /// The guest has connected, or could not. Its stream may still be on its way.
    pub(super) fn connected(&mut self, number: u64, outcome: &Outcome) -> Result<(), Error> {
        self.forwards.unanswered -= 1;
        if let (Outcome::Failed(_), Some(connection)) = (outcome, self.forwards.asked.get(&number)) {
            reset(connection);
            self.forwards.asked.remove(&number);
        }
        self.ask_for_connections()
    }

    fn ask_for_connections(&mut self) -> Result<(), Error> {
        while let Some((port, number)) = self.forwards.next() {
            self.calls.ask(Call::Connect { port, connection: number }, Asked::Connected(number))?;
        }
        Ok(())
    }
}

/// Has whoever dialled know, when the connection is dropped, that it led nowhere.
fn reset(connection: &TcpStream) {
    // It is only closed, then.
    let _ = sockopt::set_socket_linger(connection, Some(Duration::ZERO));
}

/// Carries both directions. Each ends by itself, unless it breaks.
fn carry(connection: TcpStream, stream: UnixStream, slot: &Arc<()>) -> io::Result<()> {
    let (theirs, guests) = (connection.try_clone()?, stream.try_clone()?);
    let slots = (Arc::clone(slot), Arc::clone(slot));
    thread::spawn("port-in", move || {
        let _slot = slots.0;
        match io::copy(&mut buffered(&connection), &mut &stream) {
            Ok(_) => drop(stream.shutdown(Shutdown::Write)),
            Err(_) => break_off(&connection, &stream),
        }
    })?;
    thread::spawn("port-out", move || {
        let _slot = slots.1;
        match io::copy(&mut buffered(&guests), &mut &theirs) {
            Ok(_) => drop(theirs.shutdown(Shutdown::Write)),
            Err(_) => break_off(&theirs, &guests),
        }
    })?;
    Ok(())
}

fn buffered<T: io::Read>(from: T) -> BufReader<T> {
    BufReader::with_capacity(BUFFER_BYTES, from)
}

fn break_off(connection: &TcpStream, stream: &UnixStream) {
    let _ = connection.shutdown(Shutdown::Both);
    let _ = stream.shutdown(Shutdown::Both);
}
