//! The task service: what containerd asks of the shim.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::Task;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status as TaskStatus,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::ttrpc::{Result, TtrpcContext};
use sandbox_runtime::{lifecycle, spec};

use crate::container::{Container, Shared};
use crate::error::Error;
use crate::events::{any, timestamp};
use crate::over::Over;
use crate::process::Status;
use crate::sandbox::Pod;
use crate::stats::metrics;
use crate::stdio::Streams;
use crate::{carrier, log, place};

/// The containers of a shim.
#[derive(Debug)]
pub struct Service {
    shared: Arc<Shared>,
    containers: Mutex<BTreeMap<String, Slot>>,
    pod: Arc<Pod>,
    over: Arc<Over>,
}

/// What there is under an id.
#[derive(Debug)]
enum Slot {
    /// Somebody is making it.
    Taken,
    Container(Arc<Container>),
}

impl Service {
    /// A service without containers.
    pub fn new(shared: Arc<Shared>, pod: Arc<Pod>, over: Arc<Over>) -> Self {
        Self { shared, containers: Mutex::default(), pod, over }
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, request: &CreateTaskRequest) -> std::result::Result<Arc<Container>, Error> {
        let mut besides = Vec::new();
        if let Some(pod) = self.pod.bundle() {
            // containerd knows where to ask for it and starts nothing, so that nobody has noted it.
            place::note_same_address(Path::new(&request.bundle), &pod)
                .map_err(|error| Error::Host { step: "note the address", error })?;
            besides = carrier::mounts(&pod);
        }
        Container::create(request, besides, Arc::clone(&self.shared))
    }

    fn container(&self, id: &str) -> std::result::Result<Arc<Container>, Error> {
        match self.containers().get(id) {
            Some(Slot::Container(container)) => Ok(Arc::clone(container)),
            Some(Slot::Taken) | None => Err(Error::NotFound(format!("container {id}"))),
        }
    }
}

impl Task for Service {
    fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let id = request.id.clone();
        {
            let mut containers = self.containers();
            if containers.contains_key(&id) {
                return Err(Error::Exists(format!("container {id}")).into());
            }
            containers.insert(id.clone(), Slot::Taken);
        }
        match self.make(&request) {
            Ok(container) => {
                let pid = container.init.state().pid;
                self.containers().insert(id, Slot::Container(container));
                Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
            }
            Err(error) => {
                self.containers().remove(&id);
                log::error(Some(&id), &format!("it could not be made: {error}"));
                Err(error.into())
            }
        }
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let pid = self.container(&request.id)?.start(&request.exec_id)?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let state = process.state();
        let streams = &process.streams;
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: state.pid,
            status: task_status(state.status).into(),
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.code),
            exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = self.container(&request.id)?;
        let (pid, exit) = if request.exec_id.is_empty() {
            let (pid, exit) = container.delete()?;
            self.containers().remove(&request.id);
            (pid, Some(exit))
        } else {
            container.remove(&request.exec_id)?
        };
        Ok(DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..DeleteResponse::default()
        })
    }

    /// What stands for the container on the host: its processes are in the guest, and their ids mean nothing here.
    /// It is named after its end as well: a containerd that comes back throws away a task without processes, and with
    /// it the exit code.
    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let pid = self.container(&request.id)?.init.state().pid;
        let processes = vec![ProcessInfo { pid, ..ProcessInfo::default() }];
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.container(&request.id)?.pause()?;
        Ok(Empty::default())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.container(&request.id)?.resume()?;
        Ok(Empty::default())
    }

    fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(Error::Never("a container in a virtual machine cannot be checkpointed").into())
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let signal = i32::try_from(request.signal)
            .map_err(|_| Error::Invalid(format!("{} is no signal", request.signal)))?;
        self.container(&request.id)?.kill(&request.exec_id, signal, request.all)?;
        Ok(Empty::default())
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let streams = Streams {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let process = request.spec.into_option().unwrap_or_default().value;
        self.container(&request.id)?.add(&request.exec_id, &process, streams)?;
        Ok(Empty::default())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let size = |size: u32| {
            u16::try_from(size).map_err(|_| Error::Invalid(format!("{size} is no size of a terminal")))
        };
        let (width, height) = (size(request.width)?, size(request.height)?);
        self.container(&request.id)?.resize(&request.exec_id, width, height)?;
        Ok(Empty::default())
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::default())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        let limits = request.resources.into_option().unwrap_or_default().value;
        let limits = serde_json::from_slice(&limits)
            .map_err(|e| Error::Invalid(format!("limits that are no JSON: {e}")))?;
        container.update(spec::resources_of(limits).map_err(|e| Error::from(lifecycle::Error::from(e)))?)?;
        Ok(Empty::default())
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait(None);
        Ok(WaitResponse {
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..WaitResponse::default()
        })
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let stats = self.container(&request.id)?.stats()?;
        Ok(StatsResponse { stats: Some(any(&metrics(&stats))).into(), ..StatsResponse::default() })
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        // A containerd that comes back knows by this whether a shim lives, that of a pod of the sandbox API as well.
        let task_pid = match self.pod.pid(&request.id) {
            Some(pid) => pid,
            None => self.container(&request.id)?.init.state().pid,
        };
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    fn shutdown(&self, context: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        // It is asked after each container, and the last one is meant; a pod of the sandbox API has a word of its own.
        // `now` is from `delete`.
        if request.now || self.containers().is_empty() && self.pod.bundle().is_none() {
            self.over.tell(context.fd);
        }
        Ok(Empty::default())
    }
}

fn task_status(status: Status) -> TaskStatus {
    match status {
        Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Stopped => TaskStatus::STOPPED,
    }
}
