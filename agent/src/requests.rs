//! What the host asks for, carried out.
//!
//! A request is answered at once, except for those that wait for a process, which are answered in
//! [`crate::lifecycle`], those that wait for a container to come to rest, in [`crate::pause`], and those that wait for
//! a connection, in [`crate::forward`].

use std::path::Path;

use rustix::termios::Winsize;
use sandbox_protocol::{Call, Configure, Create, Exec, Failure, FailureKind, Joined, Outcome, Request};

use crate::configure::configure;
use crate::container::cgroup::Cgroup;
use crate::container::{self, Container, First, KeptMounts, Shared, Spawned};
use crate::forget;
use crate::network::{self, Standby};
use crate::process::{Process, Role, Serial, Stage};
use crate::serve::{Agent, Flow, ServeError};
use crate::stdio::{self, Connected, Owner, StdioError};

/// The most containers of a guest.
const MAX_CONTAINERS: usize = 256;

/// The most processes that the agent itself has started and that have not ended.
const MAX_PROCESSES: usize = 1024;

/// The longest id of a container or a process, that of a file name.
const MAX_ID_BYTES: usize = 255;

/// When a request is answered.
enum Answer {
    /// At once.
    Now(Outcome),
    /// When something has happened that it waits for.
    Later,
    /// Never: the machine goes.
    PowerOff,
}

impl Agent {
    /// Carries a request out.
    pub(crate) fn carry_out(&mut self, request: Request) -> Result<Flow, ServeError> {
        let id = request.id;
        match self.answer(id, request.call) {
            Ok(Answer::Now(outcome)) => self.reply(id, outcome)?,
            Ok(Answer::Later) => {}
            Ok(Answer::PowerOff) => return Ok(Flow::PowerOff),
            Err(failure) => self.reply(id, Outcome::Failed(failure))?,
        }
        Ok(Flow::Continue)
    }

    fn answer(&mut self, id: u64, call: Call) -> Result<Answer, Failure> {
        let done = |()| Answer::Now(Outcome::Done);
        let later = |()| Answer::Later;
        match call {
            Call::Configure(wanted) => self.configure(&wanted).map(done),
            Call::Network(wanted) => network::set_up(&wanted, self.standby.as_mut()).map(done).map_err(other),
            Call::Create(create) => self.create(id, *create).map(later),
            Call::Exec(exec) => self.exec(id, &exec).map(later),
            Call::Start { container } => self.start(id, &container).map(later),
            Call::Signal { container, process, signal, all } => {
                self.signal(&container, &process, signal, all).map(done)
            }
            Call::Resize { container, process, width, height } => {
                self.resize(&container, &process, width, height).map(done)
            }
            Call::Pause { container } => self.pause(id, &container).map(later),
            Call::Resume { container } => self.resume(id, &container).map(later),
            Call::Update { container, resources } => self.update(&container, &resources).map(done),
            Call::Processes { container } => self.processes(&container).map(Answer::Now),
            Call::Stats { container } => self.stats(&container).map(Answer::Now),
            Call::Connect { port, connection } => self.connect_to(id, port, connection).map(later),
            Call::Delete { container, share } => self.delete(&container, share.as_deref()).map(done),
            Call::PowerOff => Ok(Answer::PowerOff),
        }
    }

    fn configure(&mut self, wanted: &Configure) -> Result<(), Failure> {
        configure(wanted).map_err(other)?;
        self.stream_secret.clone_from(&wanted.stream_secret);
        let standby = Standby::of_all();
        self.standby = standby.map_err(|e| other(format!("cannot have network devices stand by: {e}")))?;
        Ok(())
    }

    fn create(&mut self, request: u64, mut create: Create) -> Result<(), Failure> {
        check_id(&create.container)?;
        if self.containers.contains_key(&create.container) {
            return Err(other(format!("the container {:?} exists already", create.container)));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(other(format!("the guest has {MAX_CONTAINERS} containers, which is its limit")));
        }
        self.check_process_count()?;
        let namespaces = container::namespaces_of(&create).map_err(other)?;
        let shared = self.shared_by(&create)?;
        let filter = container::filter_of(&create.spec).map_err(other)?;
        let devices = container::attach_devices(&create.devices, &mut create.spec).map_err(other)?;
        container::make_volumes(&create.volumes).map_err(other)?;
        let process = create.spec.process().as_ref().ok_or_else(|| other("config.json has no process"))?;
        let terminal = process.terminal().unwrap_or(false);
        let (child, agent) = stdio::prepare(terminal, create.streams, &self.dialer).map_err(other)?;
        let cgroup = Cgroup::create(&create.container, create.spec.linux().as_ref()).map_err(other)?;
        let first =
            First { create: &create, namespaces, shared: &shared, filter: filter.as_ref(), cgroup: &cgroup };
        let spawned = container::delegate(&create.spec, namespaces, &cgroup)
            .and_then(|()| container::spawn_init(&first, child));
        let spawned = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                // Empty, and nobody would ask for its removal.
                let _ = cgroup.remove();
                return Err(other(error));
            }
        };
        let mounts = KeptMounts::of(spawned.pid);
        let (name, secret) = (create.container.clone(), self.stream_secret.clone());
        let owner = Owner { container: &name, process: "", secret: &secret };
        let serial = self.adopt(owner, Role::Init, request, spawned, 0)?;
        self.watch_memory(serial, &cgroup);
        let container = Container::new(create, mounts, devices, namespaces, filter, cgroup, serial);
        self.containers.insert(name.clone(), container);
        // The host has been answering meanwhile.
        match agent.connect(owner, &self.dialer) {
            Ok(connected) => self.hold(serial, connected),
            Err(error) => self.give_up(serial, &error),
        }
        Ok(())
    }

    /// The processes in whose namespaces a container is to be.
    fn shared_by(&self, create: &Create) -> Result<Vec<Shared>, Failure> {
        let process = |joined: &Joined| {
            let init = self.container(&joined.container).map(|container| container.init)?;
            let init = self.processes.get(&init).filter(|init| !init.has_ended()).ok_or_else(|| {
                not_found(format!(
                    "the {} namespace of the container {:?} cannot be joined: it has ended",
                    joined.kind, joined.container
                ))
            })?;
            Ok(Shared { kind: joined.kind, process: init.pidfd.try_clone().map_err(other)? })
        };
        create.joined.iter().map(process).collect()
    }

    fn exec(&mut self, request: u64, exec: &Exec) -> Result<(), Failure> {
        check_id(&exec.process)?;
        self.check_process_count()?;
        if self.find(&exec.container, &exec.process).is_some() {
            return Err(other(format!(
                "the container {:?} has a process {:?} already",
                exec.container, exec.process
            )));
        }
        let container = self.container(&exec.container)?;
        let init = self
            .processes
            .get(&container.init)
            .filter(|init| init.stage == Stage::Running)
            .ok_or_else(|| not_found(format!("the container {:?} is not running", exec.container)))?;
        if container.cgroup.is_held() {
            return Err(other(format!("the container {:?} is paused: resume it first", exec.container)));
        }
        let secret = self.stream_secret.clone();
        let owner = Owner { container: &exec.container, process: &exec.process, secret: &secret };
        let terminal = exec.spec.terminal().unwrap_or(false);
        let (child, agent) = stdio::prepare(terminal, exec.streams, &self.dialer).map_err(other)?;
        let spawned = container::spawn_exec(container, init, &exec.spec, child).map_err(other)?;
        let oom_kills = container.cgroup.oom_kills();
        let serial = self.adopt(owner, Role::Exec, request, spawned, oom_kills)?;
        // The host has been answering meanwhile.
        match agent.connect(owner, &self.dialer) {
            Ok(terminal @ Connected::Terminal(_)) => self.hold(serial, terminal),
            Ok(Connected::Pumps(carried)) => self.run_unheld(serial, carried).map_err(other)?,
            Err(error) => self.give_up(serial, &error),
        }
        Ok(())
    }

    /// A process whose streams cannot be had is not to run.
    fn give_up(&mut self, serial: Serial, error: &StdioError) {
        if let Some(process) = self.processes.get_mut(&serial) {
            process.give_up(other(error));
        }
    }

    /// A process waits for the word before it executes its program; its streams are carried from then on.
    fn hold(&mut self, serial: Serial, connected: Connected) {
        if let Some(process) = self.processes.get_mut(&serial) {
            process.stdio = Some(connected);
        }
    }

    /// Takes a process that was just started into the books.
    fn adopt(
        &mut self,
        owner: Owner<'_>,
        role: Role,
        request: u64,
        spawned: Spawned,
        oom_kills_before: u64,
    ) -> Result<Serial, Failure> {
        let serial = self.number();
        self.watch_channel(serial, &spawned.channel).map_err(other)?;
        self.processes.insert(
            serial,
            Process {
                container: owner.container.to_owned(),
                id: owner.process.to_owned(),
                role,
                pid: spawned.pid,
                pidfd: spawned.pidfd,
                channel: Some(spawned.channel),
                stage: Stage::SettingUp { request, start: None },
                stdio: None,
                terminal: None,
                inputs: Vec::new(),
                outputs: Vec::new(),
                failure: None,
                oom_kills_before,
            },
        );
        Ok(serial)
    }

    fn start(&mut self, request: u64, container: &str) -> Result<(), Failure> {
        let serial = self.container(container)?.init;
        match self.processes.get_mut(&serial) {
            Some(process) if process.stage == Stage::Created => {
                process.stage = Stage::Starting { request };
                container::let_go(process.channel.as_ref()).map_err(other)
            }
            // The host need not wait for the reply to `create`.
            Some(Process { stage: Stage::SettingUp { start: start @ None, .. }, .. }) => {
                *start = Some(request);
                Ok(())
            }
            Some(_) => Err(other(format!("the container {container:?} has been started already"))),
            None => Err(other(format!("the container {container:?} has stopped"))),
        }
    }

    fn signal(&self, container: &str, process: &str, signal: i32, all: bool) -> Result<(), Failure> {
        let found = self.container(container)?;
        if all {
            return found.cgroup.signal_all(signal).map_err(other);
        }
        let process = self.find(container, process).filter(|p| !p.has_ended()).ok_or_else(|| {
            not_found(format!("the container {container:?} has no process {process:?} that runs"))
        })?;
        container::signal(&process.pidfd, signal).map_err(other)
    }

    fn resize(&self, container: &str, process: &str, width: u16, height: u16) -> Result<(), Failure> {
        self.container(container)?;
        let terminal = self
            .find(container, process)
            .and_then(|p| p.terminal.as_ref())
            .ok_or_else(|| not_found(format!("the process {process:?} of {container:?} has no terminal")))?;
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size)
            .map_err(|e| other(format!("cannot set the size of the terminal of {container:?}: {e}")))
    }

    fn delete(&mut self, id: &str, share: Option<&str>) -> Result<(), Failure> {
        let deleted = self.delete_container(id);
        if let Some(share) = share {
            check_id(share)?;
            forget::forget(share);
        }
        deleted
    }

    fn delete_container(&mut self, id: &str) -> Result<(), Failure> {
        self.container(id)?;
        if self.processes.values().any(|p| p.container == id && !p.has_ended()) {
            return Err(other(format!("the container {id:?} is not stopped: kill it first")));
        }
        // What these had to say, nobody has read so far.
        let ended: Vec<Serial> =
            self.processes.iter().filter(|(_, p)| p.container == id).map(|(serial, _)| *serial).collect();
        for serial in ended {
            let Some(process) = self.processes.remove(&serial) else { continue };
            process.inputs.iter().chain(&process.outputs).for_each(|number| drop(self.stop_pump(*number)));
        }
        let Some(container) = self.containers.remove(id) else { return Ok(()) };
        container.cgroup.remove().map_err(other)
    }

    pub(crate) fn container(&self, id: &str) -> Result<&Container, Failure> {
        self.containers.get(id).ok_or_else(|| not_found(format!("there is no container {id:?}")))
    }

    fn find(&self, container: &str, id: &str) -> Option<&Process> {
        self.processes.values().find(|p| p.container == container && p.id == id)
    }

    fn check_process_count(&self) -> Result<(), Failure> {
        if self.processes.len() < MAX_PROCESSES {
            return Ok(());
        }
        Err(other(format!("the agent carries {MAX_PROCESSES} processes, which is its limit")))
    }
}

/// An id becomes the name of a cgroup, so it must be a plain name.
fn check_id(id: &str) -> Result<(), Failure> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_+-.".contains(&b);
    let valid = (1..=MAX_ID_BYTES).contains(&id.len())
        && id.bytes().all(plain)
        && Path::new(id).file_name().is_some_and(|name| name == id);
    if valid { Ok(()) } else { Err(other(format!("{id:?} is not an id"))) }
}

/// A failure of no special kind.
pub(crate) fn other(why: impl ToString) -> Failure {
    failure(FailureKind::Other, why)
}

/// A failure for want of a container or a process.
pub(crate) fn not_found(why: impl ToString) -> Failure {
    failure(FailureKind::NotFound, why)
}

/// The most bytes of a failure's message; what is quoted in it may come from a container.
const MAX_MESSAGE_BYTES: usize = 8 << 10;

/// A failure whose message is of bounded length.
pub(crate) fn failure(kind: FailureKind, why: impl ToString) -> Failure {
    let mut message = why.to_string();
    let end = (0..=MAX_MESSAGE_BYTES).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
    if message.len() > end {
        message.truncate(end);
    }
    Failure { kind, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_ids() {
        for good in ["a", "web-1.2_x+y", &"x".repeat(255)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "é", &"x".repeat(256)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_message_is_cut_at_a_character() {
        let cut = other("é".repeat(MAX_MESSAGE_BYTES)).message;
        assert!(cut.len() <= MAX_MESSAGE_BYTES && cut.chars().all(|c| c == 'é'));
        assert_eq!(other("short").message, "short");
    }
}
