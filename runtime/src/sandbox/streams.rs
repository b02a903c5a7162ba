//! The streams of a sandbox's process: which are expected, which run, which are done.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sandbox_protocol::{Stream, Streams as Wanted};

use super::container::Serial;
use super::{Error, Event, Sender};
use crate::descriptor;
use crate::stdio::{self, Direction, Progress, Transfer};

/// How long output that has left the guest may take to be delivered when the sandbox ends early: a reader that
/// does not read cannot hold up a time-out.
const LAST_OUTPUT_TIME: Duration = Duration::from_secs(1);

/// Where the streams of a process go on our side.
#[derive(Debug, Default)]
pub struct Ends {
    /// Where its input comes from; of a terminal, its keys.
    pub stdin: Option<OwnedFd>,
    /// Where its output goes; of a terminal, all of it.
    pub stdout: Option<OwnedFd>,
    /// Where its errors go.
    pub stderr: Option<OwnedFd>,
}

impl Ends {
    /// Our own standard streams.
    pub fn inherited() -> io::Result<Self> {
        Ok(Self {
            stdin: Some(descriptor::copy_of(io::stdin())?),
            stdout: Some(descriptor::copy_of(io::stdout())?),
            stderr: Some(descriptor::copy_of(io::stderr())?),
        })
    }

    /// A terminal that is all of them.
    pub fn terminal(terminal: &OwnedFd) -> io::Result<Self> {
        Ok(Self {
            stdin: Some(descriptor::copy_of(terminal)?),
            stdout: Some(descriptor::copy_of(terminal)?),
            stderr: None,
        })
    }
}

/// The streams of one process. One that is `/dev/null` here is that of the guest there: nothing of it is carried.
///
/// Dropped after the machine is gone, it lets what has come out of it be delivered.
#[derive(Debug)]
pub struct Streams {
    container: Serial,
    process: String,
    states: BTreeMap<Stream, State>,
    ends: Ends,
    sender: Sender,
}

#[derive(Debug)]
enum State {
    Expected,
    /// It is carried; the connection is the guest's.
    Running(Arc<Progress>, UnixStream),
    Done,
}

impl Streams {
    /// Expects the streams of a container's process; an empty name is its first.
    pub fn expect(container: Serial, process: &str, terminal: bool, ends: Ends, sender: Sender) -> Self {
        let carried = |end: &Option<OwnedFd>| !end.as_ref().is_some_and(descriptor::is_null);
        let streams = match terminal {
            true => vec![(Stream::Terminal, true)],
            false => vec![
                (Stream::Stdin, carried(&ends.stdin)),
                (Stream::Stdout, carried(&ends.stdout)),
                (Stream::Stderr, carried(&ends.stderr)),
            ],
        };
        let carried = streams.into_iter().filter(|(_, carried)| *carried);
        let states = carried.map(|(stream, _)| (stream, State::Expected)).collect();
        Self { container, process: process.into(), states, ends, sender }
    }

    /// Those that the agent is to dial for.
    pub fn wanted(&self) -> Wanted {
        let has = |stream| self.states.contains_key(&stream);
        Wanted { stdin: has(Stream::Stdin), stdout: has(Stream::Stdout), stderr: has(Stream::Stderr) }
    }

    /// Takes a connection of the guest. `false`: it is not expected, and was closed.
    pub fn opened(&mut self, stream: Stream, connection: UnixStream) -> Result<bool, Error> {
        let Some(state @ State::Expected) = self.states.get_mut(&stream) else { return Ok(false) };
        let failed = |error| Error::Host { step: "attach a standard stream", error };
        let progress = Arc::new(Progress::default());
        *state = State::Running(Arc::clone(&progress), connection.try_clone().map_err(failed)?);
        self.attach(stream, connection, progress).map_err(failed)?;
        Ok(true)
    }

    /// Whether a connection may come for a stream.
    pub fn expects(&self, stream: Stream) -> bool {
        matches!(self.states.get(&stream), Some(State::Expected))
    }

    /// Notes the end of a stream.
    pub fn done(&mut self, stream: Stream, transfer: Transfer) -> Result<(), Error> {
        self.states.insert(stream, State::Done);
        // Where nothing was carried, it is still ours to close.
        drop(self.end_of(stream));
        match (stream, transfer) {
            (Stream::Stdin, _) | (_, Transfer::Complete | Transfer::ReceiverGone) => Ok(()),
            (stream, Transfer::Failed(error)) => Err(Error::Output { stream: name(stream), error }),
            (stream, Transfer::Lost(why)) => Err(Error::Lost { stream: name(stream), why }),
        }
    }

    /// Lets go of the guest's ends: what a reader of ours has not taken by now is lost.
    pub fn abandon(&self) {
        for state in self.states.values() {
            if let State::Running(_, guest) = state {
                let _ = guest.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// Whether all output has been delivered.
    pub fn are_drained(&self) -> bool {
        self.outputs().all(|state| matches!(state, State::Done))
    }

    /// A figure that changes as long as output moves, and `None` while it is our own side that is slow.
    pub fn progress(&self) -> Option<u64> {
        let mut bytes = 0;
        for state in self.outputs() {
            if let State::Running(progress, _) = state {
                if progress.is_delivering() {
                    return None;
                }
                bytes += progress.bytes();
            }
        }
        Some(bytes)
    }

    fn outputs(&self) -> impl Iterator<Item = &State> {
        self.states.iter().filter(|(stream, _)| **stream != Stream::Stdin).map(|(_, state)| state)
    }

    /// Our end of a stream, once.
    fn end_of(&mut self, stream: Stream) -> Option<OwnedFd> {
        match stream {
            Stream::Stdin => self.ends.stdin.take(),
            Stream::Stdout | Stream::Terminal => self.ends.stdout.take(),
            Stream::Stderr => self.ends.stderr.take(),
            Stream::Connection => None,
        }
    }

    fn attach(&mut self, stream: Stream, guest: UnixStream, progress: Arc<Progress>) -> io::Result<()> {
        let done = {
            let (sender, container, process) = (self.sender.clone(), self.container, self.process.clone());
            move |transfer| {
                let _ = sender.send(Event::StreamDone(container, process, stream, transfer));
            }
        };
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let direction = match stream {
            Stream::Stdin => Direction::ToGuest(self.end_of(stream).ok_or_else(gone)?),
            Stream::Stdout | Stream::Stderr => Direction::FromGuest(self.end_of(stream).ok_or_else(gone)?),
            Stream::Terminal => {
                let keys = Direction::KeysToGuest(self.end_of(Stream::Stdin).ok_or_else(gone)?);
                stdio::start("keyboard", keys, guest.try_clone()?, Arc::default(), |_| {})?;
                Direction::FromGuest(self.end_of(stream).ok_or_else(gone)?)
            }
            // No process has one.
            Stream::Connection => return Err(gone()),
        };
        stdio::start(name(stream), direction, guest, progress, done)
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_OUTPUT_TIME;
        let moves = |state: &State| matches!(state, State::Running(progress, _) if !progress.is_finished());
        while self.outputs().any(moves) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdin => "standard input",
        Stream::Stdout => "standard output",
        Stream::Stderr => "standard error",
        Stream::Terminal => "terminal",
        Stream::Connection => "connection",
    }
}
