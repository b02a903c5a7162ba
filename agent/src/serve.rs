//! The loop: one thread that waits for everything at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use sandbox_protocol::{self as protocol, FromAgent, Outcome, Reply, StreamHello};

use crate::container::Container;
use crate::container::cgroup::Cgroup;
use crate::control::{Control, ControlError};
use crate::dial::Dialer;
use crate::forward::Forwards;
use crate::network::Standby;
use crate::process::{Process, Serial};
use crate::reaper;
use crate::stream::{BUFFER_BYTES, Progress, Pump};

/// The most events taken from the kernel at once.
const EVENTS: usize = 64;

/// Tokens: a kind in the top byte, a number in the rest.
const KIND_SHIFT: u32 = 56;
const CONTROL: u64 = 0;
const CHILDREN: u64 = 1;
const CHANNEL: u64 = 2;
const PUMP: u64 = 3;
const CGROUP: u64 = 4;
const DIAL: u64 = 5;
const MEMORY: u64 = 6;

/// Why the loop ended, which ends the guest.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The control connection is of no more use.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The kernel refused what the loop needs.
    #[error("cannot {step}: {source}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl ServeError {
    fn kernel(step: &'static str) -> impl Fn(Errno) -> Self {
        move |e| Self::Kernel { step, source: e.into() }
    }
}

/// Whether the loop goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flow {
    /// It does.
    Continue,
    /// The host asked for the power-off.
    PowerOff,
}

/// All that the agent knows.
pub struct Agent {
    pub(crate) control: Control,
    pub(crate) dialer: Dialer,
    /// What the host knows the streams of this agent by.
    pub(crate) stream_secret: String,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) processes: BTreeMap<Serial, Process>,
    /// Network devices that are not in use yet.
    pub(crate) standby: Option<Standby>,
    /// Connections of the host's into the guest.
    pub(crate) forwards: Forwards,
    epoll: OwnedFd,
    children: SignalFd,
    pumps: BTreeMap<u64, Pump>,
    ready: BTreeSet<u64>,
    next_number: u64,
    /// For whatever is read and not kept.
    pub(crate) buffer: Vec<u8>,
}

impl Agent {
    /// Prepares the loop: from here on, children that end are seen.
    pub fn new(control: Control, dialer: Dialer) -> Result<Self, ServeError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(ServeError::kernel("make an epoll"))?;
        let children = watch_children()?;
        let both = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let token = |kind: u64| EventData::new_u64(kind << KIND_SHIFT);
        epoll::add(&epoll, &control, token(CONTROL), both)
            .and_then(|()| epoll::add(&epoll, children.as_fd(), token(CHILDREN), EventFlags::IN))
            .map_err(ServeError::kernel("register with epoll"))?;
        Ok(Self {
            control,
            dialer,
            stream_secret: String::new(),
            containers: BTreeMap::new(),
            processes: BTreeMap::new(),
            standby: None,
            forwards: Forwards::default(),
            epoll,
            children,
            pumps: BTreeMap::new(),
            ready: BTreeSet::new(),
            next_number: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Serves the host until it asks for the power-off.
    pub fn serve(mut self) -> Result<(), ServeError> {
        loop {
            self.control.flush()?;
            for (token, flags) in self.wait()? {
                if self.dispatch(token, flags)? == Flow::PowerOff {
                    return Ok(());
                }
                self.settle_turns()?;
            }
            self.settle_turns()?;
            for number in std::mem::take(&mut self.ready) {
                self.run_pump(number)?;
            }
        }
    }

    fn wait(&self) -> Result<Vec<(u64, EventFlags)>, ServeError> {
        let timeout = match self.ready.is_empty() {
            true => self.next_turn_limit().map(|limit| limit.saturating_duration_since(Instant::now())),
            false => Some(Duration::ZERO),
        };
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(events.iter().map(|e| (e.data.u64(), e.flags)).collect()),
            Err(e) => Err(ServeError::kernel("wait for events")(e)),
        }
    }

    fn dispatch(&mut self, token: u64, flags: EventFlags) -> Result<Flow, ServeError> {
        let number = token & ((1 << KIND_SHIFT) - 1);
        match token >> KIND_SHIFT {
            CONTROL => return self.serve_control(flags),
            CHILDREN => self.reap()?,
            CHANNEL => self.hear(number)?,
            CGROUP => self.settle()?,
            DIAL => self.dialled(number)?,
            MEMORY => self.memory_changed(number)?,
            _ => {
                if let Some(pump) = self.pumps.get_mut(&(number / 2)) {
                    pump.note(number, flags);
                }
                self.run_pump(number / 2)?;
            }
        }
        Ok(Flow::Continue)
    }

    fn serve_control(&mut self, flags: EventFlags) -> Result<Flow, ServeError> {
        if flags.contains(EventFlags::OUT) {
            self.control.flush()?;
        }
        if !flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            return Ok(Flow::Continue);
        }
        for request in self.control.receive()? {
            if self.carry_out(request)? == Flow::PowerOff {
                return Ok(Flow::PowerOff);
            }
        }
        Ok(Flow::Continue)
    }

    fn reap(&mut self) -> Result<(), ServeError> {
        while let Ok(Some(_)) = self.children.read_signal() {}
        for (pid, status) in reaper::reap() {
            self.ended(pid, status)?;
        }
        self.settle()
    }

    /// Answers a request.
    pub(crate) fn reply(&mut self, id: u64, outcome: Outcome) -> Result<(), ServeError> {
        Ok(self.control.send(&FromAgent::Reply(Reply { id, outcome }))?)
    }

    /// A number that was never given out.
    pub(crate) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Hears a process on its channel from now on.
    pub(crate) fn watch_channel(&self, serial: Serial, channel: &OwnedFd) -> Result<(), ServeError> {
        let token = EventData::new_u64(CHANNEL << KIND_SHIFT | serial);
        epoll::add(&self.epoll, channel, token, EventFlags::IN | EventFlags::RDHUP)
            .map_err(ServeError::kernel("register a process's channel"))
    }

    /// Hears it no more.
    pub(crate) fn close_channel(&self, channel: OwnedFd) {
        let _ = epoll::delete(&self.epoll, &channel);
    }

    /// Sees, from now on, the last process of a cgroup end, even one that is no child of the agent's, and all of
    /// them come to rest.
    pub(crate) fn watch_cgroup(&self, cgroup: &Cgroup) -> Result<(), ServeError> {
        let token = EventData::new_u64(CGROUP << KIND_SHIFT);
        match epoll::add(&self.epoll, cgroup.events(), token, EventFlags::PRI | EventFlags::ET) {
            // It is seen already.
            Err(Errno::EXIST) => Ok(()),
            added => added.map_err(ServeError::kernel("register a cgroup's events")),
        }
    }

    /// Sees, from now on, the kernel count what a lack of memory leads to in the container whose first process this is.
    pub(crate) fn watch_memory(&self, init: Serial, cgroup: &Cgroup) {
        let token = EventData::new_u64(MEMORY << KIND_SHIFT | init);
        let flags = EventFlags::PRI | EventFlags::ET;
        // Without it, kills are told when a process of the container ends.
        let _ = cgroup.memory_events().map(|events| epoll::add(&self.epoll, events, token, flags));
    }

    /// Sees, from now on, that a socket has connected or has failed to.
    pub(crate) fn watch_dial(&self, number: u64, socket: &OwnedFd) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, socket, EventData::new_u64(DIAL << KIND_SHIFT | number), EventFlags::OUT)
    }

    /// Sees it no more.
    pub(crate) fn stop_dial(&self, socket: &OwnedFd) {
        let _ = epoll::delete(&self.epoll, socket);
    }

    /// Carries a stream from now on.
    pub(crate) fn start_pump(&mut self, pump: Pump) -> Result<u64, ServeError> {
        let number = self.number();
        pump.register(&self.epoll, token_of(number)).map_err(ServeError::kernel("register a stream"))?;
        self.pumps.insert(number, pump);
        Ok(number)
    }

    /// Lets a stream end with what its writer, who is gone, has left.
    pub(crate) fn end_when_dry(&mut self, number: u64) {
        if let Some(pump) = self.pumps.get_mut(&number) {
            pump.end_when_dry();
            self.ready.insert(number);
        }
    }

    /// Whether a stream is still carried.
    pub(crate) fn has_pump(&self, number: u64) -> bool {
        self.pumps.contains_key(&number)
    }

    /// Closes a stream. Returns what was carrying it.
    pub(crate) fn stop_pump(&mut self, number: u64) -> Option<Pump> {
        let pump = self.pumps.remove(&number)?;
        pump.unregister(&self.epoll);
        Some(pump)
    }

    fn run_pump(&mut self, number: u64) -> Result<(), ServeError> {
        let Some(pump) = self.pumps.get_mut(&number) else { return Ok(()) };
        match pump.run(&mut self.buffer) {
            Progress::Waiting => Ok(()),
            Progress::Ready => {
                self.ready.insert(number);
                Ok(())
            }
            Progress::Unconnected => match pump.connect(&self.epoll, token_of(number)) {
                Ok(()) => {
                    self.ready.insert(number);
                    Ok(())
                }
                Err(error) => self.pump_ended(number, Progress::Broken, Some(error.to_string())),
            },
            progress @ (Progress::Done | Progress::Broken) => self.pump_ended(number, progress, None),
        }
    }

    fn pump_ended(&mut self, number: u64, how: Progress, lost: Option<String>) -> Result<(), ServeError> {
        let pump = self.stop_pump(number);
        if let Some(line) = pump.as_ref().and_then(Pump::line) {
            let StreamHello { container, process, stream, .. } = line.hello.clone();
            self.control.send(&FromAgent::Event(protocol::Event::SilentEnd {
                container,
                process,
                stream,
                lost,
            }))?;
        }
        self.forward_ended(number, how);
        self.stream_ended(number)
    }
}

/// What a pump doubles for its ends' tokens.
fn token_of(pump: u64) -> u64 {
    PUMP << (KIND_SHIFT - 1) | pump
}

/// Blocks the signal that tells of children and has it read from a descriptor instead; ignores the one that a
/// write to a closed pipe would raise.
fn watch_children() -> Result<SignalFd, ServeError> {
    let kernel = |step| move |e: nix::Error| ServeError::Kernel { step, source: e.into() };
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None).map_err(kernel("block SIGCHLD"))?;
    // SAFETY: no handler is installed, the signal is only ignored.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigIgn) }
        .map_err(kernel("ignore SIGPIPE"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(kernel("make a descriptor for SIGCHLD"))
}
