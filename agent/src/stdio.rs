//! The standard streams of a process: the ends that it gets, and the ends that the agent carries.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use sandbox_protocol::frame::{self, FrameError};
use sandbox_protocol::{MAX_STREAM_HELLO_BYTES, STREAM_PORT, Stream, StreamHello, Streams};

use crate::dial::{DialError, Dialer, Dialling};
use crate::stream::{Pump, Sink};

/// Why a stream could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The host could not be dialled.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The host did not take the stream's hello.
    #[error("the host did not take the hello of a stream: {0}")]
    Hello(#[from] FrameError),
    /// A pipe could not be made, or a descriptor not be used.
    #[error("cannot make the pipes of a process: {0}")]
    Pipe(#[from] rustix::io::Errno),
}

/// What the process gets.
#[derive(Debug)]
pub enum ChildStdio {
    /// A terminal, which it opens in the container.
    Terminal,
    /// Its descriptors 0, 1 and 2.
    Files([OwnedFd; 3]),
}

/// The agent's ends.
#[derive(Debug)]
pub enum AgentStdio {
    /// A terminal, for which the host has been dialled, and whose master is yet to come from the process.
    Terminal(Dialling),
    /// The other ends of the pipes, for the streams that the host wants.
    Pipes(Pipes),
}

/// The agent's ends of a process's pipes.
#[derive(Debug)]
pub struct Pipes {
    /// Its input, for which the host has been dialled.
    stdin: Option<(Dialling, OwnedFd)>,
    /// Its outputs.
    outputs: Vec<(Stream, OwnedFd)>,
}

/// What the agent carries.
#[derive(Debug)]
pub enum Connected {
    /// A connection for a terminal.
    Terminal(OwnedFd),
    /// Pumps that are ready to run.
    Pumps(Carried),
}

/// The pumps of a process.
#[derive(Debug, Default)]
pub struct Carried {
    /// To the process.
    pub inputs: Vec<Pump>,
    /// From the process.
    pub outputs: Vec<Pump>,
}

/// Whose streams.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// The container.
    pub container: &'a str,
    /// The process; empty: the container's first.
    pub process: &'a str,
    /// What the host knows the agent by.
    pub secret: &'a str,
}

impl Owner<'_> {
    fn hello(self, stream: Stream) -> StreamHello {
        StreamHello {
            container: self.container.to_owned(),
            process: self.process.to_owned(),
            stream,
            secret: self.secret.to_owned(),
        }
    }
}

/// Makes both sides' ends: of one terminal, or of a pipe for each stream that the host wants. For a terminal and for
/// input the host is dialled, and answers while the process is made; for output, when there is some.
pub fn prepare(
    terminal: bool,
    wanted: Streams,
    dialer: &Dialer,
) -> Result<(ChildStdio, AgentStdio), StdioError> {
    let dial = || dialer.begin(STREAM_PORT);
    if terminal {
        return Ok((ChildStdio::Terminal, AgentStdio::Terminal(dial()?)));
    }
    let (stdin_read, stdin_write) = ends(wanted.stdin)?;
    let (stdout_read, stdout_write) = ends(wanted.stdout)?;
    let (stderr_read, stderr_write) = ends(wanted.stderr)?;
    let or_null = |end: Option<OwnedFd>| end.map_or_else(null, Ok);
    let child = ChildStdio::Files([or_null(stdin_read)?, or_null(stdout_write)?, or_null(stderr_write)?]);
    let stdin = stdin_write.map(|end| Ok::<_, StdioError>((dial()?, end))).transpose()?;
    let outputs = [(Stream::Stdout, stdout_read), (Stream::Stderr, stderr_read)];
    let outputs = outputs.into_iter().filter_map(|(stream, end)| Some((stream, end?))).collect();
    Ok((child, AgentStdio::Pipes(Pipes { stdin, outputs })))
}

/// The reading and the writing end of a pipe, or none.
fn ends(wanted: bool) -> Result<(Option<OwnedFd>, Option<OwnedFd>), StdioError> {
    if !wanted {
        return Ok((None, None));
    }
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Some(read), Some(write)))
}

impl AgentStdio {
    /// Waits for the host, where it has been dialled, and tells it what for.
    pub fn connect(self, owner: Owner<'_>, dialer: &Dialer) -> Result<Connected, StdioError> {
        let Pipes { stdin, outputs } = match self {
            Self::Terminal(dialling) => {
                return Ok(Connected::Terminal(introduce(dialling, &owner.hello(Stream::Terminal))?));
            }
            Self::Pipes(pipes) => pipes,
        };
        let mut carried = Carried::default();
        if let Some((dialling, end)) = stdin {
            let connection = introduce(dialling, &owner.hello(Stream::Stdin))?;
            carried.inputs.push(Pump::new(connection, Sink::File(end))?);
        }
        for (stream, end) in outputs {
            carried.outputs.push(Pump::new(end, Sink::Line(Line::of(dialer, owner, stream)))?);
        }
        Ok(Connected::Pumps(carried))
    }
}

/// Makes the two pumps of a terminal.
pub fn carry_terminal(connection: OwnedFd, master: &OwnedFd) -> Result<Carried, StdioError> {
    let [input, output] = carry_both_ways(connection, master, Sink::File)?;
    Ok(Carried { inputs: vec![input], outputs: vec![output] })
}

/// Makes the pump from a connection of the host's to something in the guest, which ends in this way, and the one back.
///
/// Each has descriptors of its own, since a descriptor can be registered only once.
pub fn carry_both_ways(
    connection: OwnedFd,
    inside: &OwnedFd,
    kind: fn(OwnedFd) -> Sink,
) -> Result<[Pump; 2], StdioError> {
    let duplicate = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 0);
    let input = Pump::new(duplicate(&connection)?, kind(duplicate(inside)?))?;
    let output = Pump::new(duplicate(inside)?, Sink::Connection(connection))?;
    Ok([input, output])
}

/// What the host can be dialled for, and by whom.
#[derive(Debug)]
pub struct Line {
    dialer: Dialer,
    /// What it is told.
    pub hello: StreamHello,
}

impl Line {
    /// For a stream of somebody's.
    pub fn of(dialer: &Dialer, owner: Owner<'_>, stream: Stream) -> Self {
        Self { dialer: dialer.clone(), hello: owner.hello(stream) }
    }

    /// Dials the host, and says which stream it is.
    pub fn dial(&self) -> Result<OwnedFd, StdioError> {
        introduce(self.dialer.begin(STREAM_PORT)?, &self.hello)
    }
}

fn introduce(dialling: Dialling, hello: &StreamHello) -> Result<OwnedFd, StdioError> {
    let mut file = std::fs::File::from(dialling.finish()?);
    frame::write(&mut file, hello, MAX_STREAM_HELLO_BYTES)?;
    Ok(file.into())
}

fn null() -> Result<OwnedFd, StdioError> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}
