//! The streams of a sandbox's process: which are expected, which run, which are done.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sandbox_protocol::{Stream, StreamHello};

use super::{Error, Event, Sender};
use crate::descriptor;
use crate::stdio::{self, Direction, Progress, Transfer};

/// How many connections that nobody expects a guest may make before it is taken for hostile.
const MAX_STRAY: usize = 64;

/// How long output that has left the guest may take to be delivered when the sandbox ends early: a reader that
/// does not read cannot hold up a time-out.
const LAST_OUTPUT_TIME: Duration = Duration::from_secs(1);

/// The streams of one process. Dropped after the machine is gone, it lets what has come out of it be delivered.
#[derive(Debug)]
pub struct Streams {
    container: String,
    states: BTreeMap<Stream, State>,
    stray: usize,
    sender: Sender,
}

#[derive(Debug)]
enum State {
    Expected,
    Running(Arc<Progress>),
    Done,
}

impl Streams {
    /// Expects the streams of a container's first process.
    pub fn expect(container: &str, terminal: bool, sender: Sender) -> Self {
        let streams: &[Stream] = match terminal {
            true => &[Stream::Terminal],
            false => &[Stream::Stdin, Stream::Stdout, Stream::Stderr],
        };
        let states = streams.iter().map(|stream| (*stream, State::Expected)).collect();
        Self { container: container.into(), states, stray: 0, sender }
    }

    /// Takes a connection of the guest. One that is not expected is closed.
    pub fn opened(&mut self, hello: &StreamHello, connection: UnixStream) -> Result<(), Error> {
        let ours = hello.container == self.container && hello.process.is_empty();
        match self.states.get_mut(&hello.stream) {
            Some(state @ State::Expected) if ours => {
                let progress = Arc::new(Progress::default());
                *state = State::Running(Arc::clone(&progress));
                attach(hello.stream, connection, progress, &self.sender)
                    .map_err(|error| Error::Host { step: "attach a standard stream", error })
            }
            _ => {
                self.stray += 1;
                match self.stray > MAX_STRAY {
                    true => Err(Error::Protocol("it keeps opening streams that nobody expects")),
                    false => Ok(()),
                }
            }
        }
    }

    /// Notes the end of a stream.
    pub fn done(&mut self, stream: Stream, transfer: Transfer) -> Result<(), Error> {
        self.states.insert(stream, State::Done);
        match (stream, transfer) {
            (Stream::Stdin, _) | (_, Transfer::Complete | Transfer::ReceiverGone) => Ok(()),
            (stream, Transfer::Failed(error)) => Err(Error::Output { stream: name(stream), error }),
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
            if let State::Running(progress) = state {
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
}

impl Drop for Streams {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_OUTPUT_TIME;
        let moves = |state: &State| matches!(state, State::Running(progress) if !progress.is_finished());
        while self.outputs().any(moves) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn attach(stream: Stream, guest: UnixStream, progress: Arc<Progress>, sender: &Sender) -> io::Result<()> {
    let done = {
        let sender = sender.clone();
        move |transfer| {
            let _ = sender.send(Event::StreamDone(stream, transfer));
        }
    };
    match stream {
        Stream::Stdin => {
            let ours = Direction::ToGuest(descriptor::copy_of(io::stdin())?);
            stdio::start(name(stream), ours, guest, progress, done)
        }
        Stream::Stdout => {
            let ours = Direction::FromGuest(descriptor::copy_of(io::stdout())?);
            stdio::start(name(stream), ours, guest, progress, done)
        }
        Stream::Stderr => {
            let ours = Direction::FromGuest(descriptor::copy_of(io::stderr())?);
            stdio::start(name(stream), ours, guest, progress, done)
        }
        Stream::Terminal => {
            let keys = Direction::KeysToGuest(descriptor::copy_of(io::stdin())?);
            stdio::start("keyboard", keys, guest.try_clone()?, Arc::default(), |_| {})?;
            let screen = Direction::FromGuest(descriptor::copy_of(io::stdout())?);
            stdio::start(name(stream), screen, guest, progress, done)
        }
    }
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdin => "standard input",
        Stream::Stdout => "standard output",
        Stream::Stderr => "standard error",
        Stream::Terminal => "terminal",
    }
}
