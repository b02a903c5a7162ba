//! The first phase: everything on the host that the machine needs is there.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::time::{Instant, SystemTime};

use sandbox_vmm_api::{MachineKind, VmEvent};

use super::streams::Ends;
use super::{Booted, Error, Event, Inbox, Plan, Request, Watcher};
use crate::agent::{self, Listening};
use crate::machine::{LogTo, Machine};
use crate::network::{Growth, Network};
use crate::state::{OCI_VERSION, Record, StateDir, StateError, Status, Transition, rfc3339};
use crate::timings::Timeline;

/// A sandbox whose directory has its record, and whose sockets are listened on.
#[derive(Debug)]
pub struct Prepared {
    pub(super) plan: Plan,
    pub(super) record: Record,
    /// Where the process's streams go, until they are attached.
    pub(super) ends: Option<Ends>,
    _listening: [Listening; 2],
    /// Its network, where that is one of the host's.
    pub(super) network: Option<Network>,
    // Last, so that the directory is removed after everything that has a socket in it.
    pub(super) directory: StateDir,
}

impl Prepared {
    /// Writes the record and listens for the guest.
    pub fn new(mut plan: Plan, directory: StateDir, ends: Ends, inbox: &Inbox) -> Result<Self, Error> {
        let record = record_of(&plan);
        directory.write(&record)?;
        let listening = listen(&directory, inbox)?;
        let network = plan.network.prepare(&plan.id, plan.stand_in, growth(&plan))?;
        plan.machine.nets = network.iter().flat_map(Network::devices).collect();
        Ok(Self { plan, record, ends: Some(ends), _listening: listening, network, directory })
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
        let mut booted = Booted { machine, prepared: self, deadline, hello: None };
        while booted.prepared.record.machine.is_none() {
            if let Event::Machine(VmEvent::Running { machine, reason, timings }) = booted.next(inbox)? {
                let timings = timings.into_iter().map(|timing| (timing.step, timing.micros)).collect();
                timeline.mark_with("start machine", timings);
                watcher.machine(machine, &reason);
                booted.runs_on(machine)?;
            }
        }
        Ok(booted)
    }

    fn start_machine(&mut self, log_to: LogTo, inbox: &Inbox) -> Result<Machine, Error> {
        let taps: Vec<_> = self.network.iter().flat_map(Network::descriptors).collect();
        let machine = Machine::start(&self.plan.vmm, &self.plan.machine, &taps, log_to, &inbox.sender())?;
        if let Some(network) = &mut self.network {
            network.handed_over();
        }
        Ok(machine)
    }

    /// Moves to the next state and records it.
    pub(super) fn become_(&mut self, transition: Transition) -> Result<(), Error> {
        self.record.status = self.record.status.after(transition)?;
        if self.plan.detached && self.record.status == Status::Created {
            self.record.kept = true;
            self.directory.keep();
        }
        match self.directory.write(&self.record) {
            // The disk may be full; that nobody holds the directory any more says the same.
            Err(_) if self.record.status == Status::Stopped => Ok(()),
            written => Ok(written?),
        }
    }
}

/// An engine may set the network up between the creation and the start, and so may hooks.
fn growth(plan: &Plan) -> Growth {
    if plan.detached || !plan.hooks.before.is_empty() { Growth::UntilStart } else { Growth::Complete }
}

/// What a sandbox shows of itself at first.
pub(super) fn record_of(plan: &Plan) -> Record {
    Record {
        oci_version: OCI_VERSION.into(),
        id: plan.id.clone(),
        status: Status::Creating,
        pid: plan.stand_in.unwrap_or_else(std::process::id),
        bundle: plan.bundle.clone(),
        rootfs: plan.rootfs.clone(),
        cgroup: plan.cgroup.clone(),
        network: plan.network.clone(),
        annotations: plan.annotations.clone(),
        created: rfc3339(SystemTime::now()),
        machine: None,
        machine_pid: None,
        poststop: plan.hooks.poststop.clone(),
        kept: false,
        out_of_memory: false,
    }
}

fn listen(directory: &StateDir, inbox: &Inbox) -> Result<[Listening; 2], Error> {
    let paths = directory.paths();
    let path = paths.vsock_directory();
    DirBuilder::new().mode(0o700).create(&path).map_err(|error| StateError::Make { path, error })?;
    Ok([
        agent::listen_for_agent(&paths.agent_socket(), inbox.sender())?,
        agent::listen_for_streams(&paths.stream_socket(), inbox.sender())?,
    ])
}

impl Booted {
    fn runs_on(&mut self, machine: MachineKind) -> Result<(), Error> {
        self.prepared.record.machine = Some(machine);
        self.prepared.record.machine_pid = Some(self.machine.pid());
        self.prepared.directory.write(&self.prepared.record)?;
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
