//! The processes that were added to a running container.

use std::collections::BTreeMap;
use std::sync::mpsc::SyncSender;

use oci_spec::runtime::Process;
use sandbox_protocol::{Exec, ExitStatus, Stream};

use super::container::Serial;
use super::streams::{Ends, Streams};
use super::{Answer, Error, Sender};
use crate::stdio::Transfer;

/// The most processes added to one container at a time.
const MAX_EXECS: usize = 256;

/// A process to be added.
#[derive(Debug)]
pub struct ExecRequest {
    /// Its name, which nothing else in the container has.
    pub name: String,
    /// What to run.
    pub process: Box<Process>,
    /// Where its streams go.
    pub ends: Ends,
    /// Who is told how it goes: [`Answer::Done`] or [`Answer::Refused`], and then [`Answer::Exited`].
    pub asker: SyncSender<Answer>,
}

/// The processes that were added and have not ended.
#[derive(Debug, Default)]
pub struct Execs(BTreeMap<String, Running>);

#[derive(Debug)]
struct Running {
    streams: Streams,
    asker: SyncSender<Answer>,
    exit: Option<ExitStatus>,
    /// Why some of its output is lost.
    lost: Option<Error>,
}

impl Execs {
    /// Takes a process into the books. Returns what to ask of the agent.
    pub fn add(
        &mut self,
        request: ExecRequest,
        serial: Serial,
        container: &str,
        sender: Sender,
    ) -> Result<Exec, Answer> {
        if self.0.len() >= MAX_EXECS {
            return Err(Answer::refused(format!("it has {MAX_EXECS} added processes, which is the limit")));
        }
        let ExecRequest { name, process, ends, asker } = request;
        let streams = Streams::expect(serial, &name, process.terminal().unwrap_or(false), ends, sender);
        let exec = Exec {
            container: container.into(),
            process: name.clone(),
            spec: *process,
            streams: streams.wanted(),
        };
        self.0.insert(name, Running { streams, asker, exit: None, lost: None });
        Ok(exec)
    }

    /// The agent has started a process, or could not.
    pub fn started(&mut self, name: &str, outcome: Answer) {
        let failed = outcome != Answer::Done;
        if let Some(running) = self.0.get(name) {
            let _ = running.asker.try_send(outcome);
        }
        if failed {
            self.0.remove(name);
        }
    }

    /// The streams of a process.
    pub fn streams(&mut self, name: &str) -> Option<&mut Streams> {
        self.0.get_mut(name).map(|running| &mut running.streams)
    }

    /// Notes the end of a stream. What the receiver's side of it met is the receiver's own affair.
    pub fn stream_done(&mut self, name: &str, stream: Stream, transfer: Transfer) {
        if let Some(running) = self.0.get_mut(name)
            && let Err(error @ Error::Lost { .. }) = running.streams.done(stream, transfer)
        {
            running.lost = Some(error);
        }
        self.report(name);
    }

    /// Notes the end of a process.
    pub fn exited(&mut self, name: &str, status: ExitStatus) -> Result<(), Error> {
        match self.0.get_mut(name) {
            Some(running) if running.exit.is_none() => running.exit = Some(status),
            _ => return Err(Error::Protocol("it reports the end of a process that does not exist")),
        }
        self.report(name);
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a process is there.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Tells of the end of a process once its output has been delivered.
    fn report(&mut self, name: &str) {
        let Some(Running { streams, asker, exit: Some(status), lost }) = self.0.get(name) else { return };
        if streams.are_drained() {
            let _ = asker.try_send(match lost {
                Some(error) => Answer::refused(error.to_string()),
                None => Answer::Exited { status: *status },
            });
            self.0.remove(name);
        }
    }
}
