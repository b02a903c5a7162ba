//! A container: its processes and its root file system, led through its life by containerd's requests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use oci_spec::runtime::{LinuxResources, Mount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sandbox_protocol::{RootWrites, Stats};
use sandbox_runtime::lifecycle::{self, Console, MachineWanted, Place, Wanted};
use sandbox_runtime::log::Log;
use sandbox_runtime::monitor::{Added, MemoryWatch};
use sandbox_runtime::sandbox::Request;
use sandbox_runtime::spec::Overrides;
use sandbox_runtime::state::{self, SandboxId};
use sandbox_runtime::{exit, spec};
use sandbox_vmm_api::MachineKind;

use crate::error::Error;
use crate::events::{Events, timestamp};
use crate::mounts::Mounted;
use crate::options::Options;
use crate::process::{Exit, Process, Status};
use crate::stdio::{self, Streams};
use crate::{log, place};

/// The directory of a bundle that the root file system is mounted on.
pub const ROOTFS: &str = "rootfs";

/// How long what stands for a container may take to end when the container has.
const END_TIME: Duration = Duration::from_secs(30);

/// How long one whose start has failed may take to end before its client hears of it.
const FAILED_TIME: Duration = Duration::from_secs(5);

/// The exit code of a process whose end nobody has seen, as if it was killed.
const LOST: u32 = 128 + 9;

/// What the containers of a shim share.
#[derive(Debug)]
pub struct Shared {
    /// containerd's namespace.
    pub namespace: String,
    /// Where they have their state.
    pub place: Place,
    /// Where events go.
    pub events: Events,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: SandboxId,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    rootfs: Mutex<Option<Mounted>>,
    shared: Arc<Shared>,
}

impl Container {
    /// Makes a container, whose process waits to be started. It gets these mounts besides, where its configuration has
    /// none that was meant for it.
    pub fn create(
        request: &CreateTaskRequest,
        besides: Vec<Mount>,
        shared: Arc<Shared>,
    ) -> Result<Arc<Self>, Error> {
        let place = Options::of(request.options.as_ref())?.place(&shared.place)?;
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(Error::Never("a container cannot be made from a checkpoint"));
        }
        let id: SandboxId = request.id.parse().map_err(|e| Error::Invalid(format!("{e}")))?;
        let bundle = PathBuf::from(&request.bundle);
        let streams = Streams {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        let rootfs = Mounted::on(&bundle.join(ROOTFS), &request.rootfs)?;
        let (ends, held) = stdio::open(&streams, id.as_str(), &shared.namespace)?;
        let plan = lifecycle::plan(wanted(id.clone(), &bundle, besides)?, &place, &Log::plain())?;
        let mut on_machine = |kind: MachineKind, reason: &str| {
            log::info(Some(id.as_str()), &format!("machine: {kind:?}: {reason}"));
        };
        let stand_in = lifecycle::create(&plan, Some(ends), &mut on_machine)?;
        let init = Arc::new(Process::new(String::new(), streams, None));
        init.hold(held);
        init.stands(stand_in.id());
        let (execs, rootfs) = (Mutex::default(), Mutex::new(Some(rootfs)));
        let container = Arc::new(Self { id, bundle, init, execs, rootfs, shared });
        container.shared.events.publish(&TaskCreate {
            container_id: container.id.to_string(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: Some(io(&container.init.streams)).into(),
            pid: stand_in.id(),
            ..TaskCreate::default()
        });
        let watched = Arc::clone(&container);
        spawn("container", move || watched.attend(stand_in));
        Ok(container)
    }

    /// Waits for the end of what stands for the container, and tells of it.
    fn attend(&self, mut stand_in: Child) {
        let told = self.watch_memory(&stand_in);
        let code = stand_in.wait().map_or(LOST, |status| exit::code_of_process(status).into());
        let record = state::find(self.root(), &self.id);
        if !told && record.is_ok_and(|(_, record)| record.out_of_memory) {
            self.out_of_memory();
        }
        let _telling = self.init.telling();
        self.ended(&self.init, code);
    }

    /// Tells of kills for lack of memory as they happen, until what stands for the container has ended. Returns whether
    /// there were any; the record of the container knows of those that were missed.
    fn watch_memory(&self, stand_in: &Child) -> bool {
        let end = Pid::from_child(stand_in);
        let (Ok(end), Ok(socket)) =
            (pidfd_open(end, PidfdFlags::empty()), lifecycle::socket_of_living(&self.id, self.root()))
        else {
            return false;
        };
        let Ok(mut watch) = MemoryWatch::start(&socket) else { return false };
        let mut told = false;
        while watch.wait(&end) {
            if !told {
                let why = "the memory limit was reached, and a process was killed";
                log::error(Some(self.id.as_str()), why);
            }
            told = true;
            self.out_of_memory();
        }
        told
    }

    fn out_of_memory(&self) {
        // Not before its start is told.
        let _telling = self.init.telling();
        let container_id = self.id.to_string();
        self.shared.events.publish(&TaskOOM { container_id, ..TaskOOM::default() });
    }

    /// Notes the end of a process and tells of it. The caller has the right to tell.
    fn ended(&self, process: &Process, code: u32) {
        let exit = Exit::now(code);
        self.note(&process.name, &format!("the process ended with code {code}"));
        self.shared.events.publish(&TaskExit {
            container_id: self.id.to_string(),
            // The container's own is known by its name.
            id: if process.name.is_empty() { self.id.to_string() } else { process.name.clone() },
            pid: process.state().pid,
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskExit::default()
        });
        process.ended(exit);
    }

    /// Logs what its first process does. Those that are added come and go with every probe.
    fn note(&self, process: &str, message: &str) {
        if process.is_empty() {
            log::info(Some(self.id.as_str()), message);
        }
    }

    /// A process by its name; empty: the container's first.
    pub fn process(&self, name: &str) -> Result<Arc<Process>, Error> {
        if name.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(name).cloned().ok_or_else(|| Error::NotFound(format!("process {name}")))
    }

    /// Starts a process. Returns the id of what stands for it on the host.
    pub fn start(self: &Arc<Self>, name: &str) -> Result<u32, Error> {
        let process = self.process(name)?;
        let telling = process.telling();
        process.expect(&[Status::Created], "start")?;
        if process.addition.is_some() {
            // One that cannot be started has ended, for those who wait for it.
            self.start_addition(&process).inspect_err(|_| process.ended(Exit::now(LOST)))?;
        } else {
            match lifecycle::start(&self.id, self.root()) {
                Ok(failed) => failed.iter().for_each(|failed| log::error(Some(self.id.as_str()), failed)),
                Err(error) => {
                    log::error(Some(self.id.as_str()), &format!("it could not be started: {error}"));
                    drop(telling);
                    // Whoever removes it when he hears that is to find it ended.
                    process.wait(Some(Instant::now() + FAILED_TIME));
                    return Err(error.into());
                }
            }
        }
        process.becomes(Status::Running);
        self.note(name, "the process has started");
        let (container_id, pid) = (self.id.to_string(), process.state().pid);
        match name {
            "" => self.shared.events.publish(&TaskStart { container_id, pid, ..TaskStart::default() }),
            exec_id => {
                let exec_id = exec_id.to_owned();
                let event = TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() };
                self.shared.events.publish(&event);
            }
        }
        Ok(pid)
    }

    fn start_addition(self: &Arc<Self>, process: &Arc<Process>) -> Result<(), Error> {
        let Some(addition) = &process.addition else { return Ok(()) };
        let socket = lifecycle::socket_of_living(&self.id, self.root())?;
        let (ends, held) = stdio::open(&process.streams, self.id.as_str(), &self.shared.namespace)?;
        let added = Added::start(&socket, &addition.spec, ends).map_err(lifecycle::Error::from)?;
        let asker = added.asker().map_err(|error| Error::Host { step: "copy a connection", error })?;
        *addition.asker.lock().unwrap_or_else(PoisonError::into_inner) = Some(asker);
        process.hold(held);
        // Nothing on the host stands for it alone.
        process.stands(self.init.state().pid);
        let (container, process) = (Arc::clone(self), Arc::clone(process));
        spawn("process", move || container.attend_addition(&process, added));
        Ok(())
    }

    fn attend_addition(&self, process: &Process, mut added: Added) {
        let code = added.wait().map_or(LOST, |status| status.shell_code().into());
        let _telling = process.telling();
        if let Some(addition) = &process.addition {
            *addition.asker.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.ended(process, code);
    }

    /// Takes a process that is to be added, and waits to be started.
    pub fn add(&self, name: &str, spec: &[u8], streams: Streams) -> Result<(), Error> {
        if name.is_empty() {
            return Err(Error::Invalid("a process needs a name".into()));
        }
        let (mut spec, warnings) = spec::process_from_json(spec).map_err(lifecycle::Error::from)?;
        warnings.iter().for_each(|warning| log::info(Some(self.id.as_str()), warning));
        spec.set_terminal(Some(streams.terminal));
        self.init.expect(&[Status::Running, Status::Paused], "add a process to")?;
        let mut execs = self.execs();
        if execs.contains_key(name) {
            return Err(Error::Exists(format!("process {name}")));
        }
        execs.insert(name.into(), Arc::new(Process::new(name.into(), streams, Some(spec))));
        drop(execs);
        let (container_id, exec_id) = (self.id.to_string(), name.into());
        self.shared.events.publish(&TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Sends a signal to a process, or to all that there are.
    pub fn kill(&self, name: &str, signal: i32, all: bool) -> Result<(), Error> {
        let process = self.process(name)?;
        if process.addition.is_some() {
            process.expect(&[Status::Running], "send a signal to")?;
            return self.ask(&process, &Request::Signal { signal, all: false });
        }
        process.expect(&[Status::Created, Status::Running, Status::Paused], "send a signal to")?;
        match lifecycle::signal(&self.id, self.root(), signal, all).map_err(Error::from) {
            Err(error) if error.is_gone() => Err(Error::Finished),
            result => result,
        }
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, name: &str, width: u16, height: u16) -> Result<(), Error> {
        let process = self.process(name)?;
        process.expect(&[Status::Created, Status::Running, Status::Paused], "resize the terminal of")?;
        match process.addition {
            Some(_) => self.ask(&process, &Request::Resize { width, height }),
            None => Ok(lifecycle::resize(&self.id, self.root(), width, height)?),
        }
    }

    /// Asks for something that concerns an added process.
    fn ask(&self, process: &Process, request: &Request) -> Result<(), Error> {
        let addition = process.addition.as_ref().ok_or(Error::Finished)?;
        let asker = addition.asker.lock().unwrap_or_else(PoisonError::into_inner);
        asker.as_ref().ok_or(Error::Finished)?.ask(request);
        Ok(())
    }

    /// Holds every process.
    pub fn pause(&self) -> Result<(), Error> {
        // Its end is not told before this.
        let _telling = self.init.telling();
        self.init.expect(&[Status::Running], "pause")?;
        lifecycle::pause(&self.id, self.root())?;
        self.init.becomes(Status::Paused);
        let container_id = self.id.to_string();
        self.shared.events.publish(&TaskPaused { container_id, ..TaskPaused::default() });
        Ok(())
    }

    /// Lets the processes go on.
    pub fn resume(&self) -> Result<(), Error> {
        let _telling = self.init.telling();
        self.init.expect(&[Status::Paused], "resume")?;
        lifecycle::resume(&self.id, self.root())?;
        self.init.becomes(Status::Running);
        let container_id = self.id.to_string();
        self.shared.events.publish(&TaskResumed { container_id, ..TaskResumed::default() });
        Ok(())
    }

    /// What it uses.
    pub fn stats(&self) -> Result<Stats, Error> {
        Ok(lifecycle::stats(&self.id, self.root())?)
    }

    /// Changes its limits.
    pub fn update(&self, resources: LinuxResources) -> Result<(), Error> {
        Ok(lifecycle::update(&self.id, self.root(), resources)?)
    }

    /// Removes an added process that does not run. Returns how it was.
    pub fn remove(&self, name: &str) -> Result<(u32, Option<Exit>), Error> {
        let process = self.process(name)?;
        process.expect(&[Status::Created, Status::Stopped], "delete")?;
        self.execs().remove(name);
        process.let_go();
        if process.state().exit.is_none() {
            process.ended(Exit::now(LOST));
        }
        let state = process.state();
        Ok((state.pid, state.exit))
    }

    /// Removes the container, whose process does not run. Returns how that ended.
    pub fn delete(&self) -> Result<(u32, Exit), Error> {
        self.init.expect(&[Status::Created, Status::Stopped], "delete")?;
        // By force: where what stands for the container was killed, its monitor may not be gone yet.
        for line in lifecycle::delete_by_force(&self.id, self.root())? {
            log::error(Some(self.id.as_str()), &line);
        }
        let exit = self
            .init
            .wait(Some(Instant::now() + END_TIME))
            .ok_or_else(|| Error::State(format!("what stands for container {} does not end", self.id)))?;
        self.init.let_go();
        if let Some(rootfs) = self.rootfs.lock().unwrap_or_else(PoisonError::into_inner).take() {
            rootfs.unmount()?;
        }
        let pid = self.init.state().pid;
        self.shared.events.publish(&TaskDelete {
            container_id: self.id.to_string(),
            id: self.id.to_string(),
            pid,
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskDelete::default()
        });
        Ok((pid, exit))
    }

    fn root(&self) -> &Path {
        &self.shared.place.root
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wanted(id: SandboxId, bundle: &Path, binds: Vec<Mount>) -> Result<Wanted<'_>, Error> {
    Ok(Wanted {
        id,
        bundle,
        overrides: Overrides { binds, ..Overrides::default() },
        // As other runtimes do: snapshots are made of what was written there.
        writes: RootWrites::Through,
        machine: MachineWanted { choice: place::machine()?, boot_timeout: None, console: None },
        timeout: None,
        detached: true,
        console: Console::Streams,
    })
}

fn io(streams: &Streams) -> TaskIO {
    TaskIO {
        stdin: streams.stdin.clone(),
        stdout: streams.stdout.clone(),
        stderr: streams.stderr.clone(),
        terminal: streams.terminal,
        ..TaskIO::default()
    }
}

/// Starts a thread that waits for something. Without one there is nobody who could tell, and the shim is of no use.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(run) {
        log::error(None, &format!("cannot start a thread: {error}"));
        std::process::abort();
    }
}
