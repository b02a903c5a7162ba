//! The standard streams of a process: the ends that it gets, and the ends that the agent carries.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use sandbox_protocol::frame::{self, FrameError};
use sandbox_protocol::{MAX_STREAM_HELLO_BYTES, STREAM_PORT, Stream, StreamHello, Streams};

use crate::dial::{DialError, Dialer};
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

/// The agent's ends, which are not connected to the host yet.
#[derive(Debug)]
pub enum AgentStdio {
    /// A terminal, whose master is yet to come from the process.
    Terminal,
    /// The other ends of the pipes, for the streams that the host wants.
    Pipes {
        /// To standard input.
        stdin: Option<OwnedFd>,
        /// From standard output.
        stdout: Option<OwnedFd>,
        /// From standard error.
        stderr: Option<OwnedFd>,
    },
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

/// Makes both sides' ends: of one terminal, or of a pipe for each stream that the host wants.
pub fn prepare(terminal: bool, wanted: Streams) -> Result<(ChildStdio, AgentStdio), StdioError> {
    if terminal {
        return Ok((ChildStdio::Terminal, AgentStdio::Terminal));
    }
    let (stdin_read, stdin_write) = ends(wanted.stdin)?;
    let (stdout_read, stdout_write) = ends(wanted.stdout)?;
    let (stderr_read, stderr_write) = ends(wanted.stderr)?;
    let or_null = |end: Option<OwnedFd>| end.map_or_else(null, Ok);
    Ok((
        ChildStdio::Files([or_null(stdin_read)?, or_null(stdout_write)?, or_null(stderr_write)?]),
        AgentStdio::Pipes { stdin: stdin_write, stdout: stdout_read, stderr: stderr_read },
    ))
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
    /// Dials the host once for each stream.
    pub fn connect(self, dialer: &Dialer, owner: Owner<'_>) -> Result<Connected, StdioError> {
        match self {
            Self::Terminal => Ok(Connected::Terminal(dial(dialer, owner, Stream::Terminal)?)),
            Self::Pipes { stdin, stdout, stderr } => {
                let mut carried = Carried::default();
                if let Some(write) = stdin {
                    let connection = dial(dialer, owner, Stream::Stdin)?;
                    carried.inputs.push(Pump::new(connection, write, Sink::File)?);
                }
                for (read, stream) in [(stdout, Stream::Stdout), (stderr, Stream::Stderr)] {
                    if let Some(read) = read {
                        let connection = dial(dialer, owner, stream)?;
                        carried.outputs.push(Pump::new(read, connection, Sink::Connection)?);
                    }
                }
                Ok(Connected::Pumps(carried))
            }
        }
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
pub fn carry_both_ways(connection: OwnedFd, inside: &OwnedFd, kind: Sink) -> Result<[Pump; 2], StdioError> {
    let duplicate = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 0);
    let input = Pump::new(duplicate(&connection)?, duplicate(inside)?, kind)?;
    let output = Pump::new(duplicate(inside)?, connection, Sink::Connection)?;
    Ok([input, output])
}

/// Dials the host for a stream, and says which it is.
pub fn dial(dialer: &Dialer, owner: Owner<'_>, stream: Stream) -> Result<OwnedFd, StdioError> {
    let connection = dialer.dial(STREAM_PORT)?;
    let hello = StreamHello {
        container: owner.container.to_owned(),
        process: owner.process.to_owned(),
        stream,
        secret: owner.secret.to_owned(),
    };
    let mut file = std::fs::File::from(connection);
    frame::write(&mut file, &hello, MAX_STREAM_HELLO_BYTES)?;
    Ok(file.into())
}

fn null() -> Result<OwnedFd, StdioError> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}
