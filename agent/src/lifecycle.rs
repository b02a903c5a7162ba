//! From a child that sets itself up to a process whose end is reported.

use std::collections::BTreeMap;

use rustix::process::Pid;
use sandbox_protocol::{Event, ExitStatus, Failure, FromAgent, Outcome};

use crate::container::{self, channel::Heard};
use crate::process::{Process, Role, Serial, Stage};
use crate::requests::other;
use crate::serve::{Agent, ServeError};
use crate::stdio::{self, Carried, Connected};

impl Agent {
    /// Hears what a child says while it sets itself up.
    pub(crate) fn hear(&mut self, serial: Serial) -> Result<(), ServeError> {
        let Some(process) = self.processes.get_mut(&serial) else { return Ok(()) };
        let Some(channel) = process.channel.as_ref() else { return Ok(()) };
        match container::channel::hear(channel, &mut self.buffer) {
            Heard::Nothing => Ok(()),
            Heard::Ready { terminal } => self.ready(serial, terminal),
            Heard::Failed(failure) => {
                process.failure = Some(failure);
                Ok(())
            }
            Heard::End => self.executed(serial),
        }
    }

    /// The child waits for the word: its streams are carried from here on.
    fn ready(&mut self, serial: Serial, terminal: Option<i32>) -> Result<(), ServeError> {
        let Some(process) = self.processes.get_mut(&serial) else { return Ok(()) };
        let Stage::SettingUp { request, start } = process.stage else { return Ok(()) };
        let carried = match take_stdio(process, terminal) {
            Ok(carried) => carried,
            Err(failure) => {
                process.give_up(failure);
                return Ok(());
            }
        };
        let (created, start) = match process.role {
            Role::Init => (Some(request), start),
            Role::Exec => (None, Some(request)),
        };
        process.stage = start.map_or(Stage::Created, |request| Stage::Starting { request });
        if start.is_some() {
            // A child that cannot be told has ended, and its end will be seen.
            let _ = container::let_go(process.channel.as_ref());
        }
        self.carry(serial, carried)?;
        created.map_or(Ok(()), |request| self.reply(request, Outcome::Done))
    }

    /// A process does not wait for a word: it executes its program as soon as it can.
    pub(crate) fn run_unheld(&mut self, serial: Serial, carried: Carried) -> Result<(), ServeError> {
        if let Some(process) = self.processes.get_mut(&serial)
            && let Stage::SettingUp { request, .. } = process.stage
        {
            process.stage = Stage::Starting { request };
        }
        self.carry(serial, carried)
    }

    fn carry(&mut self, serial: Serial, carried: Carried) -> Result<(), ServeError> {
        let mut numbers = (Vec::new(), Vec::new());
        for pump in carried.inputs {
            numbers.0.push(self.start_pump(pump)?);
        }
        for pump in carried.outputs {
            numbers.1.push(self.start_pump(pump)?);
        }
        if let Some(process) = self.processes.get_mut(&serial) {
            (process.inputs, process.outputs) = numbers;
        }
        Ok(())
    }

    /// The child's end of the channel is closed: it has executed its program, or it has ended.
    fn executed(&mut self, serial: Serial) -> Result<(), ServeError> {
        let Some(process) = self.processes.get_mut(&serial) else { return Ok(()) };
        let channel = process.channel.take();
        let request = match process.stage {
            Stage::Starting { request } if process.failure.is_none() => {
                process.stage = Stage::Running;
                Some(request)
            }
            _ => None,
        };
        if let Some(channel) = channel {
            self.close_channel(channel);
        }
        request.map_or(Ok(()), |request| self.reply(request, Outcome::Done))
    }

    /// A child has ended.
    pub(crate) fn ended(&mut self, pid: Pid, status: ExitStatus) -> Result<(), ServeError> {
        let serial = match self.processes.iter().find(|(_, p)| p.pid == pid && !p.has_ended()) {
            Some((serial, _)) => *serial,
            // An orphan of a container.
            None => return Ok(()),
        };
        // What it said last comes before its end.
        for _ in 0..container::channel::MAX_MESSAGES {
            self.hear(serial)?;
        }
        let Some(process) = self.processes.get_mut(&serial) else { return Ok(()) };
        match process.stage {
            Stage::SettingUp { request, start } => self.failed(serial, &[Some(request), start], status),
            Stage::Starting { request } => self.failed(serial, &[Some(request)], status),
            _ => {
                process.stage = Stage::Ended(status);
                let inputs = std::mem::take(&mut process.inputs);
                if process.role == Role::Init
                    && let Some(container) = self.containers.get(&process.container)
                {
                    container.cgroup.kill();
                    self.watch_cgroup(&container.cgroup)?;
                }
                inputs.into_iter().for_each(|number| drop(self.stop_pump(number)));
                Ok(())
            }
        }
    }

    /// A process could not be set up or executed: nothing of it stays.
    fn failed(
        &mut self,
        serial: Serial,
        requests: &[Option<u64>],
        status: ExitStatus,
    ) -> Result<(), ServeError> {
        let Some(process) = self.processes.remove(&serial) else { return Ok(()) };
        for number in process.inputs.iter().chain(&process.outputs) {
            self.stop_pump(*number);
        }
        let oom_kills = self.containers.get(&process.container).map_or(0, |c| c.cgroup.oom_kills());
        let failure = process.failure.unwrap_or_else(|| {
            let memory = if oom_kills > process.oom_kills_before {
                ": linux.resources.memory.limit is too small for it"
            } else {
                ""
            };
            let how = match status {
                ExitStatus::Code(code) => format!("ended with code {code}"),
                ExitStatus::Signal(signal) => format!("was killed by signal {signal}"),
            };
            other(format!("the process {how} before it could execute its program{memory}"))
        });
        if process.role == Role::Init
            && let Some(container) = self.containers.remove(&process.container)
        {
            container.cgroup.kill();
            let _ = container.cgroup.remove();
        }
        requests
            .iter()
            .flatten()
            .try_for_each(|request| self.reply(*request, Outcome::Failed(failure.clone())))
    }

    /// Lets the output of ended processes run dry where nobody is left to add to it.
    pub(crate) fn settle(&mut self) -> Result<(), ServeError> {
        let alone: Vec<Serial> = self
            .processes
            .iter()
            .filter(|(_, p)| matches!(p.stage, Stage::Ended(_)) && self.is_alone(p))
            .map(|(serial, _)| *serial)
            .collect();
        for serial in alone {
            let Some(process) = self.processes.get_mut(&serial) else { continue };
            if let Stage::Ended(status) = process.stage {
                process.stage = Stage::Draining(status);
            }
            for number in process.outputs.clone() {
                self.end_when_dry(number);
            }
            self.report(serial)?;
        }
        Ok(())
    }

    /// Whether all that could write to a process's output is gone: of a container's first process, everything
    /// in the container; of another, the process itself, since what it left behind may live on.
    fn is_alone(&self, process: &Process) -> bool {
        match process.role {
            Role::Exec => true,
            Role::Init => self.containers.get(&process.container).is_none_or(|c| !c.cgroup.is_populated()),
        }
    }

    /// A stream has ended.
    pub(crate) fn stream_ended(&mut self, number: u64) -> Result<(), ServeError> {
        let owner = self.processes.iter_mut().find(|(_, p)| p.outputs.contains(&number));
        let Some((serial, process)) = owner else { return Ok(()) };
        process.outputs.retain(|n| *n != number);
        let serial = *serial;
        self.report(serial)
    }

    /// Reports the end of a process, once its output has been handed over.
    fn report(&mut self, serial: Serial) -> Result<(), ServeError> {
        let Some(process) = self.processes.get(&serial) else { return Ok(()) };
        let Stage::Draining(status) = process.stage else { return Ok(()) };
        if !process.outputs.is_empty() {
            return Ok(());
        }
        let container = process.container.clone();
        self.tell_of_kills(&container)?;
        let Some(process) = self.processes.remove(&serial) else { return Ok(()) };
        let cgroup = self.containers.get(&container).map(|c| &c.cgroup);
        let event = Event::Exited {
            status,
            out_of_memory: cgroup.is_some_and(|c| c.oom_kills() > process.oom_kills_before),
            details: match process.role {
                Role::Init => cgroup.map(|c| c.counters()).unwrap_or_default(),
                Role::Exec => BTreeMap::new(),
            },
            container,
            process: process.id,
        };
        Ok(self.control.send(&FromAgent::Event(event))?)
    }
}

/// Takes what is to be carried; a terminal's master is fetched from the child that opened it.
fn take_stdio(process: &mut Process, terminal: Option<i32>) -> Result<Carried, Failure> {
    match (process.stdio.take(), terminal) {
        (Some(Connected::Pumps(carried)), _) => Ok(carried),
        (Some(Connected::Terminal(connection)), Some(fd)) => {
            let master = container::channel::fetch(&process.pidfd, fd).map_err(other)?;
            let carried = stdio::carry_terminal(connection, &master).map_err(other)?;
            process.terminal = Some(master);
            Ok(carried)
        }
        (_, None) | (None, _) => Err(other("the process came up without its terminal")),
    }
}

impl Process {
    /// Ends a process that is setting itself up; its end is then seen and the failure reported.
    pub(crate) fn give_up(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
        let _ = container::signal(&self.pidfd, libc::SIGKILL);
    }

    /// Whether it has ended, reported or not.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended(_) | Stage::Draining(_))
    }
}
