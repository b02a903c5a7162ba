//! The second phase: the machine's process is there, and the guest boots.

use std::os::unix::net::UnixStream;
use std::time::{Instant, SystemTime};

use base64::Engine;
use sandbox_protocol::{Call, Configure, Hello};
use sandbox_vmm_api::{ExitReason, MachineChoice, VmEvent};

use super::prepared::cancels;
use super::{Answer, Error, Event, Inbox, Prepared, Ready, Watcher};
use crate::agent::Secret;
use crate::machine::Machine;
use crate::timings::Timeline;

/// Entropy for a guest: twice what its pool takes in at once.
const ENTROPY_BYTES: usize = 64;

/// What a machine that boots still has to come to.
const AGENT: &str = "its agent answered";

/// A sandbox whose machine has been started.
#[derive(Debug)]
pub struct Booted {
    // First, so that the machine is gone before what it uses is.
    pub(super) machine: Machine,
    pub(super) prepared: Prepared,
    /// When the agent has to have spoken.
    pub(super) deadline: Instant,
    pub(super) hello: Option<(Hello, UnixStream)>,
}

impl Booted {
    /// Waits for the agent and tells it what every guest is told.
    pub fn ready<'a>(
        mut self,
        inbox: &'a Inbox,
        watcher: &'a mut dyn Watcher,
        timeline: &'a mut Timeline,
    ) -> Result<Ready<'a>, Error> {
        let (hello, connection) = self.greet(inbox)?;
        timeline.mark_with(
            "boot guest",
            vec![("kernel".into(), hello.kernel_micros), ("agent".into(), hello.agent_micros)],
        );
        let configuration = configure(&self.prepared.secret)?;
        let mut ready = Ready::new(self, connection, inbox, watcher, timeline)?;
        ready.ask(configuration, "take its configuration")?;
        ready.set_up_network()?;
        ready.timeline.mark("configure guest");
        Ok(ready)
    }

    fn greet(&mut self, inbox: &Inbox) -> Result<(Hello, UnixStream), Error> {
        loop {
            if let Some(hello) = self.hello.take() {
                return Ok(hello);
            }
            self.next(inbox)?;
        }
    }

    /// The next event of a sandbox that boots, those that end it turned into errors.
    pub(super) fn next(&mut self, inbox: &Inbox) -> Result<Event, Error> {
        let times = self.prepared.plan.times;
        let console = self.prepared.plan.config.console.is_some();
        match inbox.next(Some(self.deadline)).ok_or(Error::NoAgent { limit: times.answer, console })? {
            Event::Machine(VmEvent::Exited { reason }) => Err(self.ended(reason)),
            Event::MachineGone => Err(Error::MachineDied(self.machine.last_words())),
            // The machine's own word says more, where there is one.
            Event::AgentLost(why) => {
                Err(machine_ended(&mut self.machine, inbox, AGENT).unwrap_or(Error::AgentLost(why)))
            }
            Event::ClientGone => Err(Error::ClientGone),
            Event::Request(serial, request, answer) => {
                if let Some(signal) = cancels(&request) {
                    reply(answer, Answer::Done);
                    return Err(Error::Cancelled(signal));
                }
                reply(answer, Answer::refused("the process has not started yet"));
                Ok(Event::Request(serial, request, None))
            }
            Event::Exec(serial, request) => {
                let _ = request.asker.try_send(Answer::refused("container not running: it is creating"));
                Ok(Event::ExecGone(serial, request.name))
            }
            Event::Join(newcomer) => {
                let _ =
                    newcomer.owner.try_send(Answer::refused("the sandbox that it is to join is creating"));
                Ok(Event::OwnerGone(newcomer.place.serial))
            }
            // It may come before the machine's own report, which has the longer way.
            Event::AgentReady(hello, connection) => {
                self.hello = Some((hello.clone(), connection.try_clone().map_err(thread_error)?));
                Ok(Event::AgentReady(hello, connection))
            }
            Event::Agent(_) => Err(Error::Protocol("its agent speaks before it is asked anything")),
            event => Ok(event),
        }
    }

    /// A machine that cannot be had may have an alternative.
    fn ended(&self, reason: ExitReason) -> Error {
        let asked_for_kvm = self.prepared.plan.config.machine == MachineChoice::Kvm;
        match reason {
            ExitReason::Failed { message }
                if asked_for_kvm && self.prepared.first.record.machine.is_none() =>
            {
                Error::NoKvm(message)
            }
            reason => Error::MachineEnded { reason, before: AGENT },
        }
    }
}

/// Why a machine ended, if it tells so within a moment: a guest that goes takes its connections with it.
pub(super) fn machine_ended(machine: &mut Machine, inbox: &Inbox, before: &'static str) -> Option<Error> {
    const MOMENT: std::time::Duration = std::time::Duration::from_millis(500);
    let deadline = Instant::now() + MOMENT;
    loop {
        match inbox.next(Some(deadline))? {
            Event::Machine(VmEvent::Exited { reason }) => {
                return Some(Error::MachineEnded { reason, before });
            }
            Event::MachineGone => return Some(Error::MachineDied(machine.last_words())),
            _ => {}
        }
    }
}

/// Answers a request, if anybody waits for it.
pub(super) fn reply(to: Option<std::sync::mpsc::SyncSender<Answer>>, answer: Answer) {
    if let Some(to) = to {
        let _ = to.try_send(answer);
    }
}

fn thread_error(error: std::io::Error) -> Error {
    Error::Host { step: "take the agent's connection", error }
}

fn configure(secret: &Secret) -> Result<Call, Error> {
    let mut entropy = [0; ENTROPY_BYTES];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::Host { step: "get entropy for the guest", error: error.into() })?;
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(Call::Configure(Configure {
        time_ns: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
        entropy: base64::engine::general_purpose::STANDARD.encode(entropy),
        hostname: "sandbox".into(),
        share: true,
        stream_secret: secret.text().into(),
    }))
}
