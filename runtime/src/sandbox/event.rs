//! Everything that can happen to a sandbox, in one queue.
//!
//! Threads that wait for something (the machine, the agent, streams, requests) send it here; the driver alone
//! reads, and so is the only one that changes a sandbox. The queue is short: a guest that floods it waits for
//! the driver, and takes no memory.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SendError, SyncSender, sync_channel};
use std::time::Instant;

use sandbox_protocol::{FromAgent, Hello, Stream, StreamHello};
use sandbox_vmm_api::VmEvent;

use super::Error;
use super::container::{Newcomer, Serial};
use super::execs::ExecRequest;
use super::request::{Answer, Request};
use crate::block::Given;
use crate::stdio::Transfer;

/// How many events may wait.
const QUEUE_LENGTH: usize = 32;

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// The machine reported something.
    Machine(VmEvent),
    /// The machine's process closed its connection: it has ended, or is about to.
    MachineGone,
    /// The agent dialled and said who it is.
    AgentReady(Hello, UnixStream),
    /// The agent sent something.
    Agent(FromAgent),
    /// The agent's connection ended, or carried what is against the protocol.
    AgentLost(String),
    /// The guest dialled for a stream.
    StreamOpened(StreamHello, UnixStream),
    /// A stream of a container's process has carried all it ever will. An empty name is its first process.
    StreamDone(Serial, String, Stream, Transfer),
    /// Somebody on the host has dialled this port of the guest.
    Dialled(u16, TcpStream),
    /// Somebody asks for something of a container; the answer goes to the last, if anybody waits for one.
    Request(Serial, Request, Option<SyncSender<Answer>>),
    /// Somebody wants one more container.
    Join(Box<Newcomer>),
    /// Whoever made a container and answers for it is gone.
    OwnerGone(Serial),
    /// Somebody wants one more process in a container.
    Exec(Serial, ExecRequest),
    /// Somebody asks for something that concerns an added process of a container.
    ToExec(Serial, String, Request),
    /// Whoever asked for an added process is gone.
    ExecGone(Serial, String),
    /// What the host had to do for a container is done.
    Worked(Serial, Work),
    /// The client has gone.
    ClientGone,
}

/// What the host does for a container in a thread of its own, since it may take its time.
#[derive(Debug)]
pub enum Work {
    /// Its files and block devices are there, and the hooks that come before it have run.
    Prepared(Result<Vec<Given>, Error>),
    /// The hooks that see its files have run.
    Shown(Result<(), Error>),
    /// The hooks that come after its start have run. What went wrong.
    Hooked(Vec<String>),
    /// Its files have been taken away.
    Left,
    /// Its block devices have been taken away.
    Gone,
}

/// Where events are sent.
#[derive(Clone, Debug)]
pub struct Sender(SyncSender<Event>);

impl Sender {
    /// Sends an event, waiting for room. An error: the driver has ended, and nobody wants to know any more.
    pub fn send(&self, event: Event) -> Result<(), SendError<()>> {
        self.0.send(event).map_err(|_| SendError(()))
    }

    /// Sends an event if there is room: what the driver itself may do.
    pub fn try_send(&self, event: Event) -> Result<(), SendError<()>> {
        self.0.try_send(event).map_err(|_| SendError(()))
    }
}

/// Where the driver gets its events.
#[derive(Debug)]
pub struct Inbox {
    receiver: Receiver<Event>,
    sender: Sender,
}

impl Inbox {
    /// An empty queue.
    pub fn new() -> Self {
        let (sender, receiver) = sync_channel(QUEUE_LENGTH);
        Self { receiver, sender: Sender(sender) }
    }

    /// A way to send to it.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// The next event. `None`: there was none by the deadline.
    pub fn next(&self, deadline: Option<Instant>) -> Option<Event> {
        match deadline {
            // Never disconnected: we hold a sender.
            None => self.receiver.recv().ok(),
            Some(deadline) => {
                self.receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
            }
        }
    }
}

impl Default for Inbox {
    fn default() -> Self {
        Self::new()
    }
}
