//! What a sandbox does about the requests of others, once its agent answers.

use std::sync::mpsc::SyncSender;
use std::time::Instant;

use sandbox_protocol::{Call, Outcome};

use super::booted::reply;
use super::execs::ExecRequest;
use super::prepared::cancels;
use super::ready::{Asked, Ready, STOP_TIME};
use super::{Answer, Error, Request};
use crate::state::{Status, Transition};

impl Ready {
    pub(super) fn requested(
        &mut self,
        request: Request,
        asker: Option<SyncSender<Answer>>,
    ) -> Result<(), Error> {
        let status = self.booted.prepared.record.status;
        let attended = !self.booted.prepared.plan.detached;
        if attended
            && status != Status::Running
            && let Some(signal) = cancels(&request)
        {
            reply(asker, Answer::Done);
            return Err(Error::Cancelled(signal));
        }
        let (container, process) = (self.container(), String::new());
        let call = match request {
            Request::Start => {
                self.start_wanted(asker);
                return Ok(());
            }
            Request::Exec { .. } => {
                reply(asker, Answer::refused("it came without its standard streams"));
                return Ok(());
            }
            Request::Pause => return self.becomes(Transition::Paused, Call::Pause { container }, asker),
            Request::Resume => return self.becomes(Transition::Resumed, Call::Resume { container }, asker),
            Request::Processes => Call::Processes { container },
            Request::Stats => Call::Stats { container },
            Request::Update { resources } => Call::Update { container, resources },
            Request::Resize { width, height } => Call::Resize { container, process, width, height },
            Request::Signal { signal, all } => {
                if signal == rustix::process::Signal::KILL.as_raw() {
                    self.cut.get_or_insert(Instant::now() + STOP_TIME);
                }
                Call::Signal { container, process, signal, all }
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

    fn start_wanted(&mut self, asker: Option<SyncSender<Answer>>) {
        match self.booted.prepared.record.status {
            Status::Created if self.starter.is_none() && asker.is_some() => self.starter = asker,
            status => {
                let why = format!("cannot start a container that is {}", status.name());
                reply(asker, Answer::refused(why));
            }
        }
    }

    fn becomes(
        &mut self,
        transition: Transition,
        call: Call,
        asker: Option<SyncSender<Answer>>,
    ) -> Result<(), Error> {
        match self.booted.prepared.record.status.after(transition) {
            Ok(_) => Ok(self.calls.ask(call, Asked::Becomes(transition, asker))?),
            Err(refused) => {
                reply(asker, Answer::refused(refused.to_string()));
                Ok(())
            }
        }
    }

    pub(super) fn exec(&mut self, request: ExecRequest) -> Result<(), Error> {
        if let Some(refusal) = self.not_running() {
            let _ = request.asker.try_send(refusal);
            return Ok(());
        }
        let (name, asker) = (request.name.clone(), request.asker.clone());
        match self.execs.add(request, &self.container(), self.sender.clone()) {
            Ok(exec) => Ok(self.calls.ask(Call::Exec(Box::new(exec)), Asked::Exec(name))?),
            Err(refusal) => {
                let _ = asker.try_send(refusal);
                Ok(())
            }
        }
    }

    /// Passes on what concerns an added process, as long as that is there.
    pub(super) fn for_exec(&mut self, process: &str, request: Request) -> Result<(), Error> {
        if !self.execs.has(process) {
            return Ok(());
        }
        let (container, process) = (self.container(), process.to_owned());
        let call = match request {
            Request::Signal { signal, .. } => Call::Signal { container, process, signal, all: false },
            Request::Resize { width, height } => Call::Resize { container, process, width, height },
            _ => return Ok(()),
        };
        Ok(self.calls.ask(call, Asked::Outside(None))?)
    }

    /// Why nothing can be asked of the container's processes now.
    fn not_running(&self) -> Option<Answer> {
        match self.booted.prepared.record.status {
            Status::Running if self.exit.is_none() => None,
            Status::Running => Some(Answer::refused("container not running: its process has ended")),
            status => Some(Answer::refused(format!("container not running: it is {}", status.name()))),
        }
    }
}

/// What an asker is told of the agent's answer.
pub(super) fn answer_of(outcome: Outcome) -> Answer {
    match outcome {
        Outcome::Done => Answer::Done,
        Outcome::Failed(failure) => Answer::refused(failure.message),
        Outcome::Processes(processes) => data(&processes),
        Outcome::Stats(stats) => data(&stats),
    }
}

fn data(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_value(value) {
        Ok(value) => Answer::Data { value },
        Err(error) => Answer::refused(error.to_string()),
    }
}
