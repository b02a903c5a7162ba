//! The sandbox API: how a containerd of version 2 makes pods where a handler has `sandboxer = "shim"`.
//!
//! Its sandbox is a pod's first container that containerd knows nothing of ([`carrier`]); everything else is as where
//! containerd has made that one. The pod's containers come to the task service, as always.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::Sandbox;
use containerd_shim_protos::ttrpc::{Result, TtrpcContext};
use containerd_shim_protos::types::platform::Platform;
use nix::sys::signal::Signal;

use crate::container::{Container, Shared};
use crate::error::Error;
use crate::events::{any, timestamp};
use crate::pod::PodConfig;
use crate::process::Status;
use crate::stats::metrics;
use crate::{carrier, log};

/// How long its first process may take to end when nobody says how long.
const STOP_TIME: Duration = Duration::from_secs(10);

/// How long one that has just been started may take to listen to signals; it is told again then.
const DEAF_TIME: Duration = Duration::from_millis(500);

/// What cannot be had, in the words of a pod's author.
const NO_HOST_NETWORK: &str = "the pod asks for the host's network (hostNetwork: true): a virtual machine cannot have \
                               that; give the pod a network of its own, or another runtime class";
const NO_USERS: &str = "user namespaces of pods (hostUsers: false) are not supported with the sandbox API: leave \
                        `sandboxer` out of the handler's configuration, or hostUsers out of the pod's";

/// How the CRI calls a pod that runs, and one that does not.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The pod of a shim, where containerd has it make one.
#[derive(Debug)]
pub struct Pod {
    /// What its first container has to do with; nobody hears of that.
    shared: Arc<Shared>,
    phase: Mutex<Phase>,
}

#[derive(Debug, Default)]
enum Phase {
    /// There is none.
    #[default]
    None,
    /// It is about to be started.
    Made { id: String, bundle: PathBuf },
    /// It has been started.
    Started { id: String, bundle: PathBuf, carrier: Arc<Container>, at: SystemTime },
}

impl Pod {
    /// No pod so far.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, phase: Mutex::default() }
    }

    /// The bundle of the pod, if there is one.
    pub fn bundle(&self) -> Option<PathBuf> {
        match &*self.phase() {
            Phase::None => None,
            Phase::Made { bundle, .. } | Phase::Started { bundle, .. } => Some(bundle.clone()),
        }
    }

    /// What stands on the host for the pod of this id, if it has been started.
    pub fn pid(&self, id: &str) -> Option<u32> {
        self.carrier(id).ok().map(|(carrier, _)| carrier.init.state().pid)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first container of this pod, with the time of its start.
    fn carrier(&self, wanted: &str) -> std::result::Result<(Arc<Container>, SystemTime), Error> {
        match &*self.phase() {
            Phase::Started { id, carrier, at, .. } if id == wanted => Ok((Arc::clone(carrier), *at)),
            _ => Err(Error::NotFound(format!("sandbox {wanted}"))),
        }
    }

    fn make(&self, request: &CreateSandboxRequest) -> std::result::Result<(), Error> {
        let mut phase = self.phase();
        if !matches!(*phase, Phase::None) {
            return Err(Error::Exists(format!("sandbox {}", request.sandbox_id)));
        }
        let pod = PodConfig::read(request.options.as_ref())?;
        for (asked, why) in [(pod.node_network, NO_HOST_NETWORK), (pod.user_namespace, NO_USERS)] {
            if asked {
                return Err(Error::Invalid(why.into()));
            }
        }
        let (id, bundle) = (request.sandbox_id.clone(), PathBuf::from(&request.bundle_path));
        carrier::write(&bundle, &id, &request.netns_path, &pod)
            .map_err(|error| Error::Host { step: "write the bundle of the pod", error })?;
        *phase = Phase::Made { id, bundle };
        Ok(())
    }

    fn start(&self, wanted: &str) -> std::result::Result<(u32, SystemTime), Error> {
        let mut phase = self.phase();
        let Phase::Made { id, bundle } = &*phase else {
            return Err(Error::NotFound(format!("sandbox {wanted} that can be started")));
        };
        if id != wanted {
            return Err(Error::NotFound(format!("sandbox {wanted}")));
        }
        let request = CreateTaskRequest {
            id: id.clone(),
            bundle: bundle.to_string_lossy().into_owned(),
            ..CreateTaskRequest::default()
        };
        let carrier = Container::create(&request, Vec::new(), Arc::clone(&self.shared))?;
        let pid = match carrier.start("") {
            Ok(pid) => pid,
            Err(error) => {
                end(&carrier, STOP_TIME);
                return Err(error);
            }
        };
        let at = SystemTime::now();
        *phase = Phase::Started { id: id.clone(), bundle: bundle.clone(), carrier, at };
        Ok((pid, at))
    }

    /// Ends it, if it runs, and has nothing left of it.
    fn remove(&self) -> std::result::Result<(), Error> {
        let gone = std::mem::take(&mut *self.phase());
        if let Phase::Started { carrier, .. } = gone {
            stop(&carrier, STOP_TIME)?;
            carrier.delete()?;
        }
        Ok(())
    }
}

/// Ends what is left of a first container that could not be started.
fn end(carrier: &Container, limit: Duration) {
    let ended = stop(carrier, limit).and_then(|()| carrier.delete().map(drop));
    if let Err(error) = ended {
        log::error(Some(carrier.id.as_str()), &format!("it could not be removed: {error}"));
    }
}

/// Has the first process of a pod end, which ends all others.
fn stop(carrier: &Container, limit: Duration) -> std::result::Result<(), Error> {
    for (signal, limit) in [(Signal::SIGTERM, limit), (Signal::SIGKILL, STOP_TIME)] {
        match carrier.kill("", signal as i32, false) {
            Ok(()) | Err(Error::Finished) => {}
            Err(error) => return Err(error),
        }
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if carrier.init.wait(Some(deadline.min(Instant::now() + DEAF_TIME))).is_some() {
                return Ok(());
            }
            // The kernel keeps nothing for a first process that does not listen yet.
            let _ = carrier.kill("", signal as i32, false);
        }
    }
    Err(Error::State(format!("sandbox {} does not end", carrier.id)))
}

/// What containerd asks of the sandbox; the pod is shared with the task service, which is told when it is gone.
pub struct Service {
    pod: Arc<Pod>,
    gone: Box<dyn Fn(RawFd) + Send + Sync>,
}

impl Service {
    /// Serves a pod. `gone` is called when containerd has done with it, with the connection on which it said so.
    pub fn new(pod: Arc<Pod>, gone: impl Fn(RawFd) + Send + Sync + 'static) -> Self {
        Self { pod, gone: Box::new(gone) }
    }
}

impl Sandbox for Service {
    fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        self.pod.make(&request)?;
        Ok(CreateSandboxResponse::default())
    }

    fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Result<StartSandboxResponse> {
        let (pid, at) = self.pod.start(&request.sandbox_id).inspect_err(|error| {
            log::error(Some(&request.sandbox_id), &format!("the pod could not be started: {error}"));
        })?;
        Ok(StartSandboxResponse {
            pid,
            created_at: Some(timestamp(at)).into(),
            ..StartSandboxResponse::default()
        })
    }

    fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Result<PlatformResponse> {
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), ..Platform::default() };
        Ok(PlatformResponse { platform: Some(platform).into(), ..PlatformResponse::default() })
    }

    fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Result<StopSandboxResponse> {
        let (carrier, _) = self.pod.carrier(&request.sandbox_id)?;
        let limit = match request.timeout_secs {
            0 => STOP_TIME,
            seconds => Duration::from_secs(seconds.into()),
        };
        stop(&carrier, limit)?;
        Ok(StopSandboxResponse::default())
    }

    fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Result<WaitSandboxResponse> {
        let (carrier, _) = self.pod.carrier(&request.sandbox_id)?;
        let exit = carrier.init.wait(None);
        Ok(WaitSandboxResponse {
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..WaitSandboxResponse::default()
        })
    }

    fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let (carrier, at) = self.pod.carrier(&request.sandbox_id)?;
        let state = carrier.init.state();
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: state.pid,
            state: if state.status == Status::Stopped { NOT_READY } else { READY }.into(),
            created_at: Some(timestamp(at)).into(),
            exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
            ..SandboxStatusResponse::default()
        })
    }

    fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> Result<PingResponse> {
        Ok(PingResponse::default())
    }

    fn shutdown_sandbox(
        &self,
        context: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        self.pod.remove()?;
        (self.gone)(context.fd);
        Ok(ShutdownSandboxResponse::default())
    }

    fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let (carrier, _) = self.pod.carrier(&request.sandbox_id)?;
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.id = request.sandbox_id;
        metric.data = Some(any(&metrics(&carrier.stats()?))).into();
        Ok(response)
    }
}
