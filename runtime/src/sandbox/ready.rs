//! The third phase: the agent answers. The container is made, started, waited for.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use sandbox_protocol::{Call, ExitStatus, FromAgent, Outcome};
use sandbox_vmm_api::VmEvent;

use super::booted::reply;
use super::prepared::cancels;
use super::streams::Streams;
use super::{Answer, Booted, Error, Event, Inbox, Request};
use crate::agent::Calls;
use crate::state::{Status, Transition};

/// How long a process has to end after it was told to: a second interrupt within it, or its end after SIGKILL,
/// cuts the machine off.
pub const STOP_TIME: Duration = Duration::from_secs(10);

/// How long the output of a process that ended may stand still.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// How often a drain is looked at.
const DRAIN_POLL: Duration = Duration::from_secs(1);

/// How long a guest may take to sync and power itself off.
const POWER_OFF_TIME: Duration = Duration::from_secs(10);

/// What a machine whose agent answers still has to come to.
const END: &str = "its process ended";

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Its exit status.
    pub status: ExitStatus,
    /// Whether the memory limit killed something.
    pub out_of_memory: bool,
}

/// A sandbox whose agent answers.
#[derive(Debug)]
pub struct Ready {
    // First, so that the machine is gone when the streams are dropped.
    booted: Booted,
    calls: Calls<Asked>,
    streams: Streams,
    /// The answer to the request that the driver itself waits for.
    answer: Option<Outcome>,
    exit: Option<Exit>,
    interrupted: Option<Instant>,
    /// When the machine is cut off.
    cut: Option<Instant>,
}

/// Who asked the agent for something.
#[derive(Debug)]
enum Asked {
    /// The driver, which waits.
    Driver,
    /// Somebody outside, who may wait.
    Outside(Option<SyncSender<Answer>>),
}

impl Ready {
    pub(super) fn new(booted: Booted, connection: UnixStream, inbox: &Inbox) -> Result<Self, Error> {
        let calls = Calls::over(connection, inbox.sender())
            .map_err(|error| Error::Host { step: "start a thread for the agent", error })?;
        let create = &booted.prepared.plan.create;
        let terminal = create.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
        let streams = Streams::expect(&create.container, terminal, inbox.sender());
        Ok(Self { booted, calls, streams, answer: None, exit: None, interrupted: None, cut: None })
    }

    /// Makes the container.
    pub fn create(&mut self, inbox: &Inbox) -> Result<(), Error> {
        let create = self.booted.prepared.plan.create.clone();
        self.ask(Call::Create(Box::new(create)), "make the container", inbox)?;
        self.booted.prepared.become_(Transition::Created)
    }

    /// Starts the container's process.
    pub fn start(&mut self, inbox: &Inbox) -> Result<(), Error> {
        self.ask(Call::Start { container: self.container() }, "start the process", inbox)?;
        self.booted.prepared.become_(Transition::Started)
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self, inbox: &Inbox) -> Result<Exit, Error> {
        let limit = self.booted.prepared.plan.times.run;
        let end = limit.map(|limit| Instant::now() + limit);
        loop {
            if let Some(exit) = self.exit {
                return Ok(exit);
            }
            let deadline = [end, self.cut].into_iter().flatten().min();
            match (inbox.next(deadline), limit) {
                (Some(event), _) => self.handle(event, inbox)?,
                (None, Some(limit)) if deadline == end => return Err(Error::TimedOut(limit)),
                (None, _) => return Err(Error::Killed),
            }
        }
    }

    /// Waits until all output has been delivered, for as long as it moves or our own side is slow.
    pub fn drain(&mut self, inbox: &Inbox) -> Result<(), Error> {
        let mut moved = (Instant::now(), self.streams.progress());
        while !self.streams.are_drained() {
            if let Some(event) = inbox.next(Some(Instant::now() + DRAIN_POLL)) {
                self.handle(event, inbox)?;
            }
            let now = self.streams.progress();
            if now.is_none() || now != moved.1 {
                moved = (Instant::now(), now);
            }
            if moved.0.elapsed() > DRAIN_TIME {
                return Err(Error::NoDrain(DRAIN_TIME));
            }
        }
        Ok(())
    }

    /// Lets the guest write back what it owes the host; a guest that owes nothing is just dropped.
    pub fn power_off(mut self, inbox: &Inbox) -> Result<(), Error> {
        self.booted.prepared.become_(Transition::Ended)?;
        if !self.booted.prepared.plan.writes_to_host() {
            return Ok(());
        }
        self.calls.ask(Call::PowerOff, Asked::Outside(None))?;
        let deadline = Instant::now() + POWER_OFF_TIME;
        loop {
            match inbox.next(Some(deadline)) {
                Some(Event::Machine(VmEvent::Exited { .. }) | Event::MachineGone) => return Ok(()),
                None => return Err(Error::NoAnswer { step: "power the guest off", limit: POWER_OFF_TIME }),
                Some(_) => {}
            }
        }
    }

    /// Asks the agent for something and waits for it.
    pub(super) fn ask(&mut self, call: Call, step: &'static str, inbox: &Inbox) -> Result<(), Error> {
        let limit = self.booted.prepared.plan.times.answer;
        let deadline = Instant::now() + limit;
        self.calls.ask(call, Asked::Driver)?;
        loop {
            match self.answer.take() {
                Some(Outcome::Done) => return Ok(()),
                Some(Outcome::Failed(failure)) => return Err(Error::Agent(failure)),
                Some(Outcome::Processes(_) | Outcome::Stats(_)) => {
                    return Err(Error::Protocol("it answers what it was not asked"));
                }
                None => {}
            }
            let event = inbox.next(Some(deadline)).ok_or(Error::NoAnswer { step, limit })?;
            self.handle(event, inbox)?;
        }
    }

    /// Takes one event, whatever the sandbox is waiting for.
    fn handle(&mut self, event: Event, inbox: &Inbox) -> Result<(), Error> {
        match event {
            Event::Machine(VmEvent::Exited { reason }) => Err(Error::MachineEnded { reason, before: END }),
            Event::Machine(VmEvent::Running { .. }) => Ok(()),
            Event::MachineGone => Err(Error::MachineDied(self.booted.machine.last_words())),
            Event::AgentLost(why) => {
                Err(self.booted.machine_ended(inbox, END).unwrap_or(Error::AgentLost(why)))
            }
            Event::AgentReady(..) => Err(Error::Protocol("its agent said hello twice")),
            Event::Agent(message) => self.heard(message),
            Event::StreamOpened(hello, connection) => self.streams.opened(&hello, connection),
            Event::StreamDone(stream, transfer) => self.streams.done(stream, transfer),
            Event::Request(request, answer) => self.requested(request, answer),
            Event::ClientGone => Err(Error::ClientGone),
        }
    }

    fn heard(&mut self, message: FromAgent) -> Result<(), Error> {
        match message {
            FromAgent::Reply(answer) => match self.calls.answered(answer)? {
                (Asked::Driver, outcome) => self.answer = Some(outcome),
                (Asked::Outside(asker), Outcome::Done) => reply(asker, Answer::Done),
                (Asked::Outside(asker), Outcome::Failed(failure)) => {
                    reply(asker, Answer::refused(failure.message));
                }
                (Asked::Outside(_), Outcome::Processes(_) | Outcome::Stats(_)) => {
                    return Err(Error::Protocol("it answers what it was not asked"));
                }
            },
            FromAgent::Event(sandbox_protocol::Event::Exited {
                container,
                process,
                status,
                out_of_memory,
                ..
            }) => {
                let ours = container == self.container() && process.is_empty();
                if !ours || self.exit.is_some() {
                    return Err(Error::Protocol("it reports the end of a process that does not exist"));
                }
                self.exit = Some(Exit { status, out_of_memory });
            }
        }
        Ok(())
    }

    fn requested(&mut self, request: Request, asker: Option<SyncSender<Answer>>) -> Result<(), Error> {
        if self.booted.prepared.record.status != Status::Running
            && let Some(signal) = cancels(request)
        {
            reply(asker, Answer::Done);
            return Err(Error::Cancelled(signal));
        }
        let (container, process) = (self.container(), String::new());
        let call = match request {
            Request::Resize { width, height } => Call::Resize { container, process, width, height },
            Request::Signal { signal } => {
                if signal == rustix::process::Signal::KILL.as_raw() {
                    self.cut.get_or_insert(Instant::now() + STOP_TIME);
                }
                Call::Signal { container, process, signal, all: false }
            }
            Request::Interrupt => {
                let now = Instant::now();
                if self.interrupted.is_some_and(|before| now.duration_since(before) < STOP_TIME) {
                    return Err(Error::Interrupted);
                }
                self.interrupted = Some(now);
                Call::Signal { container, process, signal: rustix::process::Signal::INT.as_raw(), all: false }
            }
        };
        Ok(self.calls.ask(call, Asked::Outside(asker))?)
    }

    fn container(&self) -> String {
        self.booted.prepared.plan.create.container.clone()
    }
}
