//! The third phase: the agent answers. The container is made, started, waited for.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use sandbox_protocol::{Call, ExitStatus, FromAgent, Outcome, StreamHello};
use sandbox_vmm_api::VmEvent;

use super::booted::reply;
use super::execs::Execs;
use super::requests::answer_of;
use super::streams::Streams;
use super::{Answer, Booted, Error, Event, Inbox, Prepared, Request, Sender, Watcher};
use crate::agent::Calls;
use crate::hooks;
use crate::state::{Status, Transition};

/// How long a process has to end after it was told to: a second interrupt within it, or its end after SIGKILL,
/// cuts the machine off.
pub const STOP_TIME: Duration = Duration::from_secs(10);

/// How long the output of a process that ended may stand still.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// How long added processes may take to be gone after the container's own.
const SETTLE_TIME: Duration = Duration::from_secs(2);

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
#[derive(Debug)]
pub struct Ready {
    // First, so that the machine is gone when the streams are dropped.
    pub(super) booted: Booted,
    pub(super) calls: Calls<Asked>,
    streams: Streams,
    pub(super) execs: Execs,
    /// Who waits for the process to be started.
    pub(super) starter: Option<SyncSender<Answer>>,
    pub(super) sender: Sender,
    /// Connections that nobody expected.
    stray: usize,
    /// The answer to the request that the driver itself waits for.
    answer: Option<Outcome>,
    pub(super) exit: Option<Exit>,
    pub(super) interrupted: Option<Instant>,
    /// When the machine is cut off.
    pub(super) cut: Option<Instant>,
}

/// Who asked the agent for something.
#[derive(Debug)]
pub(super) enum Asked {
    /// The driver, which waits.
    Driver,
    /// Somebody outside, who may wait.
    Outside(Option<SyncSender<Answer>>),
    /// Whoever wants one more process, of this name.
    Exec(String),
    /// Somebody outside who waits for the container to become this.
    Becomes(Transition, Option<SyncSender<Answer>>),
}

impl Ready {
    pub(super) fn new(mut booted: Booted, connection: UnixStream, inbox: &Inbox) -> Result<Self, Error> {
        let calls = Calls::over(connection, inbox.sender())
            .map_err(|error| Error::Host { step: "start a thread for the agent", error })?;
        let create = &booted.prepared.plan.create;
        let terminal = create.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
        let ends = booted.prepared.ends.take().unwrap_or_default();
        let streams = Streams::expect("", terminal, ends, inbox.sender());
        Ok(Self {
            booted,
            calls,
            streams,
            execs: Execs::default(),
            starter: None,
            sender: inbox.sender(),
            stray: 0,
            answer: None,
            exit: None,
            interrupted: None,
            cut: None,
        })
    }

    /// Runs the hooks that come before the container; one that fails ends the sandbox.
    pub fn run_hooks_before(&self) -> Result<(), Error> {
        let Prepared { plan, record, .. } = &self.booted.prepared;
        Ok(hooks::run("createRuntime", &plan.hooks.before, record, Status::Creating)?)
    }

    /// Runs the hooks that come after the start of the process; one that fails is no reason to end.
    pub fn run_hooks_after_start(&self, watcher: &mut dyn Watcher) {
        let Prepared { plan, record, .. } = &self.booted.prepared;
        for failed in hooks::run_all("poststart", &plan.hooks.poststart, record, Status::Running) {
            watcher.warn(&failed.to_string());
        }
    }

    /// Tells the guest of what its network has that it does not know yet.
    pub(super) fn set_up_network(&mut self, inbox: &Inbox) -> Result<(), Error> {
        let Some(network) = &mut self.booted.prepared.network else { return Ok(()) };
        match network.update()? {
            Some(wanted) => self.ask(Call::Network(Box::new(wanted)), "set its network up", inbox),
            None => Ok(()),
        }
    }

    /// Makes the container.
    pub fn create(&mut self, inbox: &Inbox) -> Result<(), Error> {
        let create = self.booted.prepared.plan.create.clone();
        self.ask(Call::Create(Box::new(create)), "make the container", inbox)?;
        self.booted.prepared.become_(Transition::Created)
    }

    /// Waits until somebody wants the process to run. `false`: it was killed before that.
    pub fn wait_for_start(&mut self, inbox: &Inbox) -> Result<bool, Error> {
        while self.starter.is_none() && self.exit.is_none() {
            if let Some(event) = inbox.next(None) {
                self.handle(event, inbox)?;
            }
        }
        Ok(self.exit.is_none())
    }

    /// Starts the container's process.
    pub fn start(&mut self, inbox: &Inbox) -> Result<(), Error> {
        let started = self
            .set_up_network(inbox)
            .and_then(|()| self.ask(Call::Start { container: self.container() }, "start the process", inbox))
            .and_then(|()| self.booted.prepared.become_(Transition::Started));
        if let Err(error) = &started {
            reply(self.starter.take(), Answer::refused(error.to_string()));
        }
        started
    }

    /// Tells whoever wanted the process to run that it does.
    pub fn tell_starter(&mut self) {
        reply(self.starter.take(), Answer::Done);
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
            // Whoever kills it does not want to wait for a reader that never comes.
            if self.cut.is_some_and(|cut| Instant::now() > cut) {
                break;
            }
            if moved.0.elapsed() > DRAIN_TIME {
                return Err(Error::NoDrain(DRAIN_TIME));
            }
        }
        self.settle_execs(inbox)
    }

    /// Added processes end with the container; whoever asked for them hears of it, if that takes no time.
    fn settle_execs(&mut self, inbox: &Inbox) -> Result<(), Error> {
        let deadline = Instant::now() + SETTLE_TIME;
        while !self.execs.is_empty() {
            let Some(event) = inbox.next(Some(deadline)) else { return Ok(()) };
            self.handle(event, inbox)?;
        }
        Ok(())
    }

    /// Lets the guest write back what it owes the host; a guest that owes nothing is just dropped.
    pub fn power_off(mut self, inbox: &Inbox) -> Result<(), Error> {
        self.booted.prepared.record.out_of_memory = self.exit.is_some_and(|exit| exit.out_of_memory);
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
                Some(_) => return Err(Error::Protocol("it answers what it was not asked")),
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
            Event::StreamOpened(hello, connection) => self.opened(&hello, connection),
            Event::StreamDone(process, stream, transfer) if process.is_empty() => {
                self.streams.done(stream, transfer)
            }
            Event::StreamDone(process, stream, transfer) => {
                self.execs.stream_done(&process, stream, transfer);
                Ok(())
            }
            Event::Request(request, answer) => self.requested(request, answer),
            Event::Exec(request) => self.exec(request),
            Event::ToExec(process, request) => self.for_exec(&process, request),
            Event::ExecGone(process) => {
                let signal = rustix::process::Signal::KILL.as_raw();
                self.for_exec(&process, Request::Signal { signal, all: false })
            }
            Event::ClientGone if self.booted.prepared.record.kept => Ok(()),
            Event::ClientGone => Err(Error::ClientGone),
        }
    }

    fn opened(&mut self, hello: &StreamHello, connection: UnixStream) -> Result<(), Error> {
        let streams = match hello.process.as_str() {
            _ if hello.container != self.container() => None,
            "" => Some(&mut self.streams),
            process => self.execs.streams(process),
        };
        let wanted = streams.map(|streams| streams.opened(hello.stream, connection)).transpose()?;
        self.stray += usize::from(wanted != Some(true));
        match self.stray > MAX_STRAY {
            true => Err(Error::Protocol("it keeps opening streams that nobody expects")),
            false => Ok(()),
        }
    }

    fn heard(&mut self, message: FromAgent) -> Result<(), Error> {
        match message {
            FromAgent::Reply(answer) => match self.calls.answered(answer)? {
                (Asked::Driver, outcome) => self.answer = Some(outcome),
                (Asked::Outside(asker), outcome) => reply(asker, answer_of(outcome)),
                (Asked::Exec(name), outcome) => self.execs.started(&name, answer_of(outcome)),
                (Asked::Becomes(transition, asker), Outcome::Done) => {
                    self.booted.prepared.become_(transition)?;
                    reply(asker, Answer::Done);
                }
                (Asked::Becomes(_, asker), outcome) => reply(asker, answer_of(outcome)),
            },
            FromAgent::Event(sandbox_protocol::Event::Exited {
                container,
                process,
                status,
                out_of_memory,
                ..
            }) => {
                let ours = container == self.container();
                if ours && !process.is_empty() {
                    return self.execs.exited(&process, status);
                }
                if !ours || self.exit.is_some() {
                    return Err(Error::Protocol("it reports the end of a process that does not exist"));
                }
                self.exit = Some(Exit { status, out_of_memory });
            }
        }
        Ok(())
    }

    pub(super) fn container(&self) -> String {
        self.booted.prepared.plan.create.container.clone()
    }
}
