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

/// What the agent carries.
#[derive(Debug)]
pub enum AgentStdio {
    /// A connection for a terminal whose master is yet to come.
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
}

/// Makes pipes and dials the host, for one terminal or for the streams that the host wants.
pub fn prepare(
    dialer: &Dialer,
    owner: Owner<'_>,
    terminal: bool,
    wanted: Streams,
) -> Result<(ChildStdio, AgentStdio), StdioError> {
    if terminal {
        let connection = dial(dialer, owner, Stream::Terminal)?;
        return Ok((ChildStdio::Terminal, AgentStdio::Terminal(connection)));
    }
    let mut carried = Carried::default();
    let stdin = if wanted.stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let connection = dial(dialer, owner, Stream::Stdin)?;
        carried.inputs.push(Pump::new(connection, write, Sink::File)?);
        read
    } else {
        null()?
    };
    let mut output = |wanted: bool, stream| -> Result<OwnedFd, StdioError> {
        if !wanted {
            return null();
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let connection = dial(dialer, owner, stream)?;
        carried.outputs.push(Pump::new(read, connection, Sink::Connection)?);
        Ok(write)
    };
    let stdout = output(wanted.stdout, Stream::Stdout)?;
    let stderr = output(wanted.stderr, Stream::Stderr)?;
    Ok((ChildStdio::Files([stdin, stdout, stderr]), AgentStdio::Pumps(carried)))
}

/// Makes the two pumps of a terminal.
///
/// Each has descriptors of its own, since a descriptor can be registered only once.
pub fn carry_terminal(connection: OwnedFd, master: &OwnedFd) -> Result<Carried, StdioError> {
    let duplicate = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 0);
    let input = Pump::new(duplicate(&connection)?, duplicate(master)?, Sink::File)?;
    let output = Pump::new(duplicate(master)?, connection, Sink::Connection)?;
    Ok(Carried { inputs: vec![input], outputs: vec![output] })
}

fn dial(dialer: &Dialer, owner: Owner<'_>, stream: Stream) -> Result<OwnedFd, StdioError> {
    let connection = dialer.dial(STREAM_PORT)?;
    let hello =
        StreamHello { container: owner.container.to_owned(), process: owner.process.to_owned(), stream };
    let mut file = std::fs::File::from(connection);
    frame::write(&mut file, &hello, MAX_STREAM_HELLO_BYTES)?;
    Ok(file.into())
}

fn null() -> Result<OwnedFd, StdioError> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}
