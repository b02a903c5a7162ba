//! The first phase: everything on the host that the machine needs is there.

use std::borrow::Cow;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::time::Instant;

use sandbox_vmm_api::{MachineKind, ProcessIds, VmEvent};

use super::container::{Claimed, Container};
use super::streams::Ends;
use super::{Booted, ContainerPlan, Error, Event, Inbox, MachinePlan, Request, Watcher};
use crate::agent::{self, Secret};
use crate::identity;
use crate::listening::Listening;
use crate::machine::{LogTo, Machine};
use crate::network::{Growth, Loopback, Network, NetworkError};
use crate::state::{StateDir, StateError};
use crate::timings::Timeline;

/// A sandbox whose first container has its record, and whose sockets are listened on.
#[derive(Debug)]
pub struct Prepared {
    pub(super) plan: MachinePlan,
    /// What the agent's streams are known by.
    pub(super) secret: Secret,
    pub(super) listening: [Listening; 2],
    /// Its network, where that is one of the host's.
    pub(super) network: Option<Network>,
    /// What leads from the host to ports of the guest.
    pub(super) loopback: Option<Loopback>,
    // Last, so that its directory is removed after everything that has a socket in it.
    pub(super) first: Container,
}

impl Prepared {
    /// Writes the record and listens for the guest.
    pub fn new(mut plan: MachinePlan, claimed: Claimed, ends: Ends, inbox: &Inbox) -> Result<Self, Error> {
        let first = Container::new(claimed, ends, None, inbox.sender())?;
        let secret =
            Secret::new().map_err(|error| Error::Host { step: "get a secret for the agent", error })?;
        plan.config.ids = identity::of_machine();
        let listening = listen(&first.directory, secret.clone(), inbox)?;
        if let Some(ids) = plan.config.ids {
            open_to_machine(&first.directory, ids)
                .map_err(|error| Error::Host { step: "open the guest's sockets to its machine", error })?;
        }
        let of = &first.plan;
        let network = of.network.prepare(&of.id, of.stand_in, growth(of))?;
        plan.config.nets = network.iter().flat_map(Network::devices).collect();
        Ok(Self { plan, secret, listening, network, loopback: None, first })
    }

    /// Starts the machine and waits until it runs.
    pub fn boot(
        mut self,
        inbox: &Inbox,
        watcher: &mut dyn Watcher,
        timeline: &mut Timeline,
    ) -> Result<Booted, Error> {
        let log_to = if self.plan.debug { LogTo::Stderr } else { LogTo::Memory };
        let deadline = Instant::now() + self.plan.times.answer;
        let machine = self.start_machine(log_to, inbox)?;
        // While the machine is busy starting. A pod without it is a pod.
        self.take_loopback().unwrap_or_else(|error| watcher.warn(&error.to_string()));
        let mut booted = Booted { machine, prepared: self, deadline, hello: None };
        while booted.prepared.first.record.machine.is_none() {
            if let Event::Machine(VmEvent::Running { machine, reason, timings }) = booted.next(inbox)? {
                let timings = timings.into_iter().map(|timing| (timing.step, timing.micros)).collect();
                timeline.mark_with("start machine", timings);
                watcher.machine(machine, &reason);
                booted.runs_on(machine)?;
            }
        }
        Ok(booted)
    }

    fn take_loopback(&mut self) -> Result<(), NetworkError> {
        let path = self.first.plan.network.path(self.first.plan.stand_in);
        let path = path.filter(|_| self.plan.takes_loopback).map(Cow::into_owned);
        self.loopback = path.map(|path| Loopback::take(&path)).transpose()?;
        Ok(())
    }

    fn start_machine(&mut self, log_to: LogTo, inbox: &Inbox) -> Result<Machine, Error> {
        let taps: Vec<_> = self.network.iter().flat_map(Network::descriptors).collect();
        let machine = Machine::start(&self.plan.vmm, &self.plan.config, &taps, log_to, &inbox.sender())?;
        if let Some(network) = &mut self.network {
            network.handed_over();
        }
        Ok(machine)
    }
}

/// An engine may set the network up between the creation and the start, and so may hooks.
fn growth(plan: &ContainerPlan) -> Growth {
    if plan.detached || plan.hooks.come_before_start() { Growth::UntilStart } else { Growth::Complete }
}

fn listen(directory: &StateDir, secret: Secret, inbox: &Inbox) -> Result<[Listening; 2], Error> {
    let paths = directory.paths();
    let path = paths.vsock_directory();
    DirBuilder::new().mode(0o700).create(&path).map_err(|error| StateError::Make { path, error })?;
    Ok([
        agent::listen_for_agent(&paths.agent_socket(), inbox.sender())?,
        agent::listen_for_streams(&paths.stream_socket(), secret, inbox.sender())?,
    ])
}

/// What the guest may dial is the machine's to connect to, and nobody else's but root's.
fn open_to_machine(directory: &StateDir, ids: ProcessIds) -> io::Result<()> {
    let paths = directory.paths();
    identity::open_to(ids, &paths.vsock_directory(), 0o710)?;
    for socket in [paths.agent_socket(), paths.stream_socket()] {
        identity::open_to(ids, &socket, 0o660)?;
    }
    Ok(())
}

impl Booted {
    fn runs_on(&mut self, machine: MachineKind) -> Result<(), Error> {
        let first = &mut self.prepared.first;
        first.record.machine = Some(machine);
        first.record.machine_pid = Some(self.machine.pid());
        first.directory.write(&first.record)?;
        Ok(())
    }
}

/// What a request means to a sandbox that has no process yet: a signal that would end it ends the start.
pub(super) fn cancels(request: &Request) -> Option<u8> {
    use rustix::process::Signal;
    let signal = match request {
        Request::Interrupt => Signal::INT.as_raw(),
        Request::Signal { signal, .. } => *signal,
        _ => return None,
    };
    let fatal = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::KILL];
    fatal.iter().any(|s| s.as_raw() == signal).then(|| u8::try_from(signal).ok()).flatten()
}
