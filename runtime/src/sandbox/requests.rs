//! What a sandbox does about the requests of others, once its agent answers.

use std::sync::mpsc::SyncSender;
use std::time::Instant;

use rustix::process::Signal;
use sandbox_protocol::{Call, Outcome};

use super::booted::reply;
use super::container::{STARTING, Serial, Stage};
use super::execs::ExecRequest;
use super::prepared::cancels;
use super::ready::{Asked, Ready, STOP_TIME};
use super::{Answer, Error, Request};
use crate::state::Transition;

const ENDED: &str = "container not running: its process has ended";

impl Ready<'_> {
    pub(super) fn requested(
        &mut self,
        serial: Serial,
        request: Request,
        asker: Option<SyncSender<Answer>>,
    ) -> Result<(), Error> {
        let Some(target) = self.containers.get_mut(&serial) else {
            reply(asker, Answer::refused(ENDED));
            return Ok(());
        };
        let attended = !target.plan.detached;
        if attended
            && target.stage.comes_before_running()
            && let Some(signal) = cancels(&request)
        {
            reply(asker, Answer::Done);
            return Err(Error::Cancelled(signal));
        }
        match target.stage {
            // It is not to be.
            Stage::Preparing | Stage::Showing if kills(&request) => {
                target.unwanted = true;
                reply(asker, Answer::Done);
                return Ok(());
            }
            Stage::Preparing | Stage::Showing => {
                reply(asker, Answer::refused("container not running: it is creating"));
                return Ok(());
            }
            Stage::Leaving => {
                reply(asker, Answer::refused(ENDED));
                return Ok(());
            }
            _ => {}
        }
        let (container, process) = (target.name().to_owned(), String::new());
        let killed = kills(&request);
        let call = match request {
            Request::Start => return self.start_wanted(serial, asker),
            Request::Exec { .. } | Request::Join { .. } => {
                reply(asker, Answer::refused("it came without its standard streams"));
                return Ok(());
            }
            Request::Pause => {
                return self.becomes(serial, Transition::Paused, Call::Pause { container }, asker);
            }
            Request::Resume => {
                return self.becomes(serial, Transition::Resumed, Call::Resume { container }, asker);
            }
            Request::WatchMemory => {
                target.oom_kills.watched_by(asker, Instant::now());
                if target.exit.is_some() {
                    target.oom_kills.end(Instant::now());
                }
                return Ok(());
            }
            Request::Processes => Call::Processes { container },
            Request::Stats => Call::Stats { container },
            Request::Update { resources } => Call::Update { container, resources },
            Request::Resize { width, height } => Call::Resize { container, process, width, height },
            Request::Signal { signal, all } => {
                // Whoever kills it does not want to wait for a hook that never ends.
                target.hooks_awaited &= !killed;
                if killed && target.exit.is_none() {
                    target.cut.get_or_insert(Instant::now() + STOP_TIME);
                }
                Call::Signal { container, process, signal, all }
            }
            Request::Interrupt => {
                let now = Instant::now();
                if self.interrupted.is_some_and(|before| now.duration_since(before) < STOP_TIME) {
                    return Err(Error::Interrupted);
                }
                self.interrupted = Some(now);
                Call::Signal { container, process, signal: Signal::INT.as_raw(), all: false }
            }
        };
        Ok(self.calls.ask(call, Asked::Outside(asker))?)
    }

    fn start_wanted(&mut self, serial: Serial, asker: Option<SyncSender<Answer>>) -> Result<(), Error> {
        let Some(container) = self.containers.get(&serial) else { return Ok(()) };
        match container.stage {
            Stage::Standing if asker.is_some() => self.start(serial, asker),
            _ => {
                let status = container.record.status.name();
                reply(asker, Answer::refused(format!("cannot start a container that is {status}")));
                Ok(())
            }
        }
    }

    fn becomes(
        &mut self,
        serial: Serial,
        transition: Transition,
        call: Call,
        asker: Option<SyncSender<Answer>>,
    ) -> Result<(), Error> {
        let Some(container) = self.containers.get(&serial) else { return Ok(()) };
        if matches!(container.stage, Stage::Starting(_)) {
            reply(asker, Answer::refused(STARTING));
            return Ok(());
        }
        match container.record.status.after(transition) {
            Ok(_) => Ok(self.calls.ask(call, Asked::Becomes(serial, transition, asker))?),
            Err(refused) => {
                reply(asker, Answer::refused(refused.to_string()));
                Ok(())
            }
        }
    }

    pub(super) fn exec(&mut self, serial: Serial, request: ExecRequest) -> Result<(), Error> {
        let asker = request.asker.clone();
        let Some(container) = self.containers.get_mut(&serial) else {
            let _ = asker.try_send(Answer::refused(ENDED));
            return Ok(());
        };
        if let Some(refusal) = container.not_running() {
            let _ = asker.try_send(refusal);
            return Ok(());
        }
        let (name, of) = (request.name.clone(), container.name().to_owned());
        match container.execs.add(request, serial, &of, self.inbox.sender()) {
            Ok(exec) => Ok(self.calls.ask(Call::Exec(Box::new(exec)), Asked::Exec(serial, name))?),
            Err(refusal) => {
                let _ = asker.try_send(refusal);
                Ok(())
            }
        }
    }

    /// Whoever asked for an added process is gone.
    pub(super) fn kill_exec(&mut self, serial: Serial, process: &str) -> Result<(), Error> {
        self.for_exec(serial, process, Request::Signal { signal: Signal::KILL.as_raw(), all: false })
    }

    /// Passes on what concerns an added process, as long as that is there.
    pub(super) fn for_exec(&mut self, serial: Serial, process: &str, request: Request) -> Result<(), Error> {
        let Some(container) = self.containers.get(&serial).filter(|c| c.execs.has(process)) else {
            return Ok(());
        };
        let (container, process) = (container.name().to_owned(), process.to_owned());
        let call = match request {
            Request::Signal { signal, .. } => Call::Signal { container, process, signal, all: false },
            Request::Resize { width, height } => Call::Resize { container, process, width, height },
            _ => return Ok(()),
        };
        Ok(self.calls.ask(call, Asked::Outside(None))?)
    }
}

fn kills(request: &Request) -> bool {
    matches!(request, Request::Signal { signal, .. } if *signal == Signal::KILL.as_raw())
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
