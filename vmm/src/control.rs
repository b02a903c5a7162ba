//! The control socket: one line of JSON asks, one line answers. A descriptor that a request needs comes with the first
//! bytes of its line.
//!
//! Whoever can reach the socket may use it; it lies in a directory of the sandbox's own. Even so a peer gets
//! no more than its share: a request has a largest length, there are only so many connections, one that is
//! silent is closed after a while, and an answer that is not read closes its connection.

use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use sandbox_vmm_api::{ControlReply, ControlRequest, VmState, socket};

use crate::machine::{Machine, MachineError};

/// The most bytes of a request with its line end; the longest there is has a few dozen.
const MAX_REQUEST_BYTES: usize = 1024;
/// The most connections at a time.
const MAX_CONNECTIONS: usize = 8;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// The control socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the control socket {path}: {why}")]
pub struct ListenError {
    path: PathBuf,
    why: io::Error,
}

/// Whether the machine is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    GoOn,
    /// Somebody asked for its end.
    Stop,
}

/// The control socket and its connections.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    connections: Vec<Connection>,
    state: VmState,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    /// For the next request.
    descriptor: Option<OwnedFd>,
    deadline: Instant,
}

impl Control {
    /// Makes the socket, for its owner alone.
    pub fn listen(path: &Path) -> Result<Self, ListenError> {
        let failed = |why| ListenError { path: path.to_owned(), why };
        let listener = socket::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, connections: Vec::new(), state: VmState::Running })
    }

    /// The descriptors that are worth looking at when they are readable.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let streams = self.connections.iter().map(|connection| connection.stream.as_fd());
        std::iter::once(self.listener.as_fd()).chain(streams).collect()
    }

    /// When a connection has been silent for too long, if there is one.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.connections.iter().map(|connection| connection.deadline).min()
    }

    /// Takes new connections and answers what is asked on those there are.
    pub fn serve(&mut self, machine: &mut dyn Machine) -> Verdict {
        self.accept();
        let mut verdict = Verdict::GoOn;
        let mut connections = std::mem::take(&mut self.connections);
        let now = Instant::now();
        connections.retain_mut(|connection| {
            let mut answer = |line: &[u8], descriptor| self.answer(line, descriptor, machine, &mut verdict);
            connection.serve(&mut answer) && connection.deadline > now
        });
        self.connections = connections;
        verdict
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() < MAX_CONNECTIONS && stream.set_nonblocking(true).is_ok() {
                let deadline = Instant::now() + SILENCE;
                self.connections.push(Connection { stream, input: Vec::new(), descriptor: None, deadline });
            }
        }
    }

    fn answer(
        &mut self,
        line: &[u8],
        descriptor: Option<OwnedFd>,
        machine: &mut dyn Machine,
        verdict: &mut Verdict,
    ) -> ControlReply {
        match serde_json::from_slice(line) {
            Ok(ControlRequest::Stop) => {
                *verdict = Verdict::Stop;
                ControlReply::Done
            }
            Ok(request) => self
                .execute(request, descriptor, machine)
                .unwrap_or_else(|error| ControlReply::Error { message: error.to_string() }),
            Err(error) => ControlReply::Error { message: format!("not a request: {error}") },
        }
    }

    fn execute(
        &mut self,
        request: ControlRequest,
        descriptor: Option<OwnedFd>,
        machine: &mut dyn Machine,
    ) -> Result<ControlReply, MachineError> {
        match request {
            ControlRequest::State => Ok(ControlReply::State { state: self.state, machine: machine.kind() }),
            ControlRequest::Pause => {
                machine.pause()?;
                self.state = VmState::Paused;
                Ok(ControlReply::Done)
            }
            ControlRequest::Resume => {
                machine.resume()?;
                self.state = VmState::Running;
                Ok(ControlReply::Done)
            }
            ControlRequest::Statistics => machine.statistics().map(ControlReply::Statistics),
            ControlRequest::AddBlock => add_block(descriptor, machine),
            ControlRequest::RemoveBlock { number } => {
                machine.blocks().remove(number);
                Ok(ControlReply::Done)
            }
            ControlRequest::Stop => Ok(ControlReply::Done),
        }
    }
}

fn add_block(descriptor: Option<OwnedFd>, machine: &dyn Machine) -> Result<ControlReply, MachineError> {
    let failed = |why: io::Error| MachineError::new("showing the guest a block device", why);
    let file = descriptor.ok_or_else(|| failed(io::Error::other("no descriptor came with the request")))?;
    machine.blocks().add(file.into()).map(|number| ControlReply::Block { number }).map_err(failed)
}

impl Connection {
    /// Answers every whole line that has come; says whether the connection goes on.
    fn serve(&mut self, answer: &mut dyn FnMut(&[u8], Option<OwnedFd>) -> ControlReply) -> bool {
        let open = self.fill();
        while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            self.deadline = Instant::now() + SILENCE;
            let descriptor = self.descriptor.take();
            if self.reply(&answer(&line, descriptor)).is_err() {
                return false;
            }
        }
        open && self.input.len() < MAX_REQUEST_BYTES
    }

    /// Reads what there is, up to the longest request.
    fn fill(&mut self) -> bool {
        let mut chunk = [0; MAX_REQUEST_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let buffers = &mut [IoSliceMut::new(&mut chunk)];
        let received = recvmsg(&self.stream, buffers, &mut control, RecvFlags::CMSG_CLOEXEC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptor = descriptors.last();
            }
        }
        match received.map(|message| message.bytes) {
            Ok(0) => false,
            Ok(count) => {
                self.input.extend_from_slice(chunk.get(..count).unwrap_or_default());
                true
            }
            Err(error) => {
                matches!(io::Error::from(error).kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
            }
        }
    }

    fn reply(&mut self, reply: &ControlReply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
