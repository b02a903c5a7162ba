//! The third phase: the agent answers. The sandbox leads the lives of its containers until the first has ended.
//!
//! What happens is taken here and passed on to the container that it concerns; what a container goes through is
//! in `lives.rs`, what others ask of it in `requests.rs`.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use sandbox_protocol::{Call, ExitStatus, FromAgent, Outcome, Stream, StreamHello};
use sandbox_vmm_api::VmEvent;

use super::booted::{machine_ended, reply};
use super::container::{Container, Serial, Stage};
use super::forwards::Forwards;
use super::requests::answer_of;
use super::{Answer, Booted, Error, Event, Inbox, MachinePlan, Prepared, Watcher};
use crate::agent::Calls;
use crate::block::Given;
use crate::listening::Listening;
use crate::machine::Machine;
use crate::network::Network;
use crate::state::Transition;
use crate::stdio::Transfer;
use crate::timings::Timeline;

/// How long a process has to end after it was told to: a second interrupt within it, or its end after SIGKILL,
/// cuts the machine off.
pub const STOP_TIME: Duration = Duration::from_secs(10);

/// How often a drain is looked at.
const DRAIN_POLL: Duration = Duration::from_secs(1);

/// How long a guest may take to sync and power itself off.
const POWER_OFF_TIME: Duration = Duration::from_secs(10);

/// How many connections that nobody expects a guest may make before it is taken for hostile.
const MAX_STRAY: usize = 64;

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
pub struct Ready<'a> {
    // First, so that the machine is gone when the streams are dropped.
    pub(super) machine: Machine,
    pub(super) calls: Calls<Asked>,
    _listening: [Listening; 2],
    /// Its network, where that is one of the host's.
    network: Option<Network>,
    /// Connections of the host's into the guest.
    pub(super) forwards: Forwards,
    pub(super) plan: MachinePlan,
    pub(super) containers: BTreeMap<Serial, Container>,
    /// The container that came with the sandbox, and ends it.
    pub(super) first: Serial,
    pub(super) inbox: &'a Inbox,
    pub(super) watcher: &'a mut dyn Watcher,
    pub(super) timeline: &'a mut Timeline,
    /// Connections that nobody expected.
    stray: usize,
    /// The answer to the request that the driver itself waits for.
    answer: Option<Outcome>,
    pub(super) interrupted: Option<Instant>,
    /// When the first process has run for as long as it may.
    pub(super) run_until: Option<Instant>,
}

/// Who asked the agent for something.
#[derive(Debug)]
pub(super) enum Asked {
    /// The driver, which waits.
    Driver,
    /// Somebody outside, who may wait.
    Outside(Option<SyncSender<Answer>>),
    /// This container, which is to be made.
    Made(Serial),
    /// This container, which is to run.
    Started(Serial),
    /// This container, which is to be forgotten.
    Deleted(Serial),
    /// Whoever has dialled a port, and has this number.
    Connected(u64),
    /// Whoever wants one more process, of this name, in a container.
    Exec(Serial, String),
    /// Somebody outside who waits for the container to become this.
    Becomes(Serial, Transition, Option<SyncSender<Answer>>),
}

impl<'a> Ready<'a> {
    pub(super) fn new(
        booted: Booted,
        connection: UnixStream,
        inbox: &'a Inbox,
        watcher: &'a mut dyn Watcher,
        timeline: &'a mut Timeline,
    ) -> Result<Self, Error> {
        let calls = Calls::over(connection, inbox.sender())
            .map_err(|error| Error::Host { step: "start a thread for the agent", error })?;
        let Booted { machine, prepared, .. } = booted;
        let Prepared { plan, listening, network, loopback, first, .. } = prepared;
        let forwards = Forwards::of(loopback, inbox.sender())
            .map_err(|error| Error::Host { step: "start a thread for the pod's ports", error })?;
        Ok(Self {
            machine,
            calls,
            _listening: listening,
            network,
            forwards,
            plan,
            first: first.serial,
            containers: [(first.serial, first)].into(),
            inbox,
            watcher,
            timeline,
            stray: 0,
            answer: None,
            interrupted: None,
            run_until: None,
        })
    }

    /// Tells the guest of what its network has that it does not know yet.
    pub(super) fn set_up_network(&mut self) -> Result<(), Error> {
        let Some(network) = &mut self.network else { return Ok(()) };
        match network.update()? {
            Some(wanted) => self.ask(Call::Network(Box::new(wanted)), "set its network up"),
            None => Ok(()),
        }
    }

    /// Leads the containers through their lives, until the first one has ended.
    pub fn lead(&mut self) -> Result<Exit, Error> {
        self.prepare(self.first)?;
        loop {
            if let Some(exit) = self.advance()? {
                return Ok(exit);
            }
            match self.inbox.next(self.deadline()) {
                Some(event) => self.handle(event)?,
                None => self.overdue()?,
            }
        }
    }

    /// Tells everybody who waits for something why it will not come: the sandbox ends of this.
    pub fn refuse_all(&mut self, error: &Error) {
        let refused = || Answer::refused(error.to_string());
        for container in self.containers.values_mut() {
            reply(container.starter.take(), refused());
            match &mut container.stage {
                Stage::Preparing | Stage::Making | Stage::Showing => container.tell(refused()),
                Stage::Starting(asker) => reply(asker.take(), refused()),
                _ => {}
            }
        }
        for asked in self.calls.give_up() {
            match asked {
                Asked::Outside(asker) | Asked::Becomes(_, _, asker) => reply(asker, refused()),
                Asked::Exec(serial, name) => {
                    if let Some(container) = self.containers.get_mut(&serial) {
                        container.execs.started(&name, refused());
                    }
                }
                _ => {}
            }
        }
    }

    /// Lets the guest write back what it owes the host; a guest that owes nothing is just dropped.
    pub fn power_off(mut self) -> Result<(), Error> {
        for container in self.containers.values_mut() {
            container.stop()?;
        }
        if self.owes_writes() {
            self.calls.ask(Call::PowerOff, Asked::Outside(None))?;
            self.wait_for_power_off()?;
        }
        self.timeline.mark("power off");
        Ok(())
    }

    fn owes_writes(&self) -> bool {
        let writes = |c: &Container| {
            c.shares.iter().any(|share| !share.read_only) || c.blocks.iter().any(Given::is_writable)
        };
        self.containers.values().any(writes) || self.plan.writes_to_host()
    }

    fn wait_for_power_off(&self) -> Result<(), Error> {
        let deadline = Instant::now() + POWER_OFF_TIME;
        loop {
            match self.inbox.next(Some(deadline)) {
                Some(Event::Machine(VmEvent::Exited { .. }) | Event::MachineGone) => return Ok(()),
                None => return Err(Error::NoAnswer { step: "power the guest off", limit: POWER_OFF_TIME }),
                Some(_) => {}
            }
        }
    }

    /// Asks the agent for something and waits for it.
    pub(super) fn ask(&mut self, call: Call, step: &'static str) -> Result<(), Error> {
        let limit = self.plan.times.answer;
        let deadline = Instant::now() + limit;
        self.calls.ask(call, Asked::Driver)?;
        loop {
            match self.answer.take() {
                Some(Outcome::Done) => return Ok(()),
                Some(Outcome::Failed(failure)) => return Err(Error::Agent(failure)),
                Some(_) => return Err(Error::Protocol("it answers what it was not asked")),
                None => {}
            }
            let event = self.inbox.next(Some(deadline)).ok_or(Error::NoAnswer { step, limit })?;
            self.handle(event)?;
        }
    }

    /// When something has to be looked at, if nothing happens before.
    fn deadline(&self) -> Option<Instant> {
        let containers = self.containers.values();
        let drains = containers.clone().any(|container| matches!(container.stage, Stage::Draining(..)));
        let poll = drains.then(|| Instant::now() + DRAIN_POLL);
        containers.filter_map(Container::deadline).chain(poll).chain(self.run_until).min()
    }

    /// Takes one event, whatever the sandbox is waiting for. One that is about a container that has gone is late.
    fn handle(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Machine(VmEvent::Exited { reason }) => Err(Error::MachineEnded { reason, before: END }),
            Event::Machine(VmEvent::Running { .. }) => Ok(()),
            Event::MachineGone => Err(Error::MachineDied(self.machine.last_words())),
            Event::AgentLost(why) => {
                Err(machine_ended(&mut self.machine, self.inbox, END).unwrap_or(Error::AgentLost(why)))
            }
            Event::AgentReady(..) => Err(Error::Protocol("its agent said hello twice")),
            Event::Agent(message) => self.heard(message),
            Event::StreamOpened(hello, connection) => self.opened(&hello, connection),
            Event::StreamDone(serial, process, stream, transfer) => {
                self.stream_done(serial, &process, stream, transfer)
            }
            Event::Dialled(port, connection) => self.dialled(port, connection),
            Event::Request(serial, request, answer) => self.requested(serial, request, answer),
            Event::Join(newcomer) => self.join(*newcomer),
            Event::OwnerGone(serial) => self.owner_gone(serial),
            Event::Exec(serial, request) => self.exec(serial, request),
            Event::ToExec(serial, process, request) => self.for_exec(serial, &process, request),
            Event::ExecGone(serial, process) => self.kill_exec(serial, &process),
            Event::Worked(serial, work) => self.worked(serial, work),
            Event::ClientGone if self.first().record.kept => Ok(()),
            Event::ClientGone => Err(Error::ClientGone),
        }
    }

    fn opened(&mut self, hello: &StreamHello, connection: UnixStream) -> Result<(), Error> {
        let wanted = match hello.stream {
            Stream::Connection => {
                let opened = self.forwards.opened(&hello.process, connection);
                opened.map_err(|error| Error::Host { step: "carry a connection to a port", error })?
            }
            _ => self.stream_opened(hello, connection)?,
        };
        self.stray += usize::from(!wanted);
        match self.stray > MAX_STRAY {
            true => Err(Error::Protocol("it keeps opening streams that nobody expects")),
            false => Ok(()),
        }
    }

    /// Takes a stream of a process. `false`: it is not expected, and was closed.
    fn stream_opened(&mut self, hello: &StreamHello, connection: UnixStream) -> Result<bool, Error> {
        // Which of its words reaches us first, a connection or an answer, is not for the guest to say.
        let container = self.containers.values_mut().find(|container| container.name() == hello.container);
        let streams = container.and_then(|container| container.streams_of(&hello.process));
        let opened = streams.map(|streams| streams.opened(hello.stream, connection)).transpose()?;
        Ok(opened == Some(true))
    }

    fn stream_done(
        &mut self,
        serial: Serial,
        process: &str,
        stream: Stream,
        transfer: Transfer,
    ) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        if process.is_empty() {
            let done = container.streams.done(stream, transfer);
            return done.or_else(|error| self.fail(serial, error));
        }
        container.execs.stream_done(process, stream, transfer);
        Ok(())
    }

    /// An output has ended, the guest says, without a connection.
    fn silent_end(
        &mut self,
        container: &str,
        process: &str,
        stream: Stream,
        lost: Option<String>,
    ) -> Result<(), Error> {
        const NOBODY: Error =
            Error::Protocol("it reports the end of a stream of a container that does not exist");
        let container = self.in_guest(container).ok_or(NOBODY)?;
        let serial = container.serial;
        if !container.streams_of(process).is_some_and(|streams| streams.expects(stream)) {
            // It has dialled for it after all.
            return Ok(());
        }
        self.stream_done(serial, process, stream, lost.map_or(Transfer::Complete, Transfer::Lost))
    }

    fn heard(&mut self, message: FromAgent) -> Result<(), Error> {
        match message {
            FromAgent::Reply(answer) => match self.calls.answered(answer)? {
                (Asked::Driver, outcome) => self.answer = Some(outcome),
                (Asked::Outside(asker), outcome) => reply(asker, answer_of(outcome)),
                (Asked::Made(serial), outcome) => return self.made(serial, outcome),
                (Asked::Started(serial), outcome) => return self.started(serial, outcome),
                (Asked::Deleted(serial), _) => return self.forgotten(serial),
                (Asked::Connected(number), outcome) => return self.connected(number, &outcome),
                (Asked::Exec(serial, name), outcome) => {
                    if let Some(container) = self.containers.get_mut(&serial) {
                        container.execs.started(&name, answer_of(outcome));
                    }
                }
                (Asked::Becomes(serial, transition, asker), Outcome::Done) => {
                    if let Some(container) = self.containers.get_mut(&serial) {
                        container.become_(transition)?;
                    }
                    reply(asker, Answer::Done);
                }
                (Asked::Becomes(_, _, asker), outcome) => reply(asker, answer_of(outcome)),
            },
            FromAgent::Event(sandbox_protocol::Event::Exited {
                container,
                process,
                status,
                out_of_memory,
                ..
            }) => return self.exited(&container, &process, Exit { status, out_of_memory }),
            FromAgent::Event(sandbox_protocol::Event::SilentEnd { container, process, stream, lost }) => {
                return self.silent_end(&container, &process, stream, lost);
            }
            FromAgent::Event(sandbox_protocol::Event::OutOfMemory { container }) => {
                return self.out_of_memory(&container);
            }
        }
        Ok(())
    }

    /// The container that the guest calls so, if it may know of it.
    pub(super) fn in_guest(&mut self, name: &str) -> Option<&mut Container> {
        self.containers.values_mut().find(|container| container.name() == name && container.is_in_guest())
    }

    /// The container that came with the sandbox: it is there as long as the sandbox is.
    pub(super) fn first(&self) -> &Container {
        &self.containers[&self.first]
    }
}
