//! All that a driver needs to know, decided before anything is made.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sandbox_protocol::Create;
use sandbox_vmm_api::{ShareEntry, VmConfig};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::hooks::HostHooks;
use crate::network;
use crate::spec::HostBlock;
use crate::state::{OCI_VERSION, Record, SandboxId, Status, rfc3339};

/// A container to be, and where it is going to live.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Plan {
    /// The container.
    pub container: ContainerPlan,
    /// Where it is going to live.
    pub home: Home,
    /// Where the start of its machine is counted, if it is: the client's affair.
    #[serde(skip)]
    pub starts: Option<PathBuf>,
}

/// Where a container lives.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Home {
    /// In a machine that is made for it.
    Own(Box<MachinePlan>),
    /// In the machine of a pod.
    Pod(PodPlan),
}

/// A container to be.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ContainerPlan {
    /// Its id.
    pub id: SandboxId,
    /// The bundle, absolute.
    pub bundle: PathBuf,
    /// The root file system, absolute.
    pub rootfs: PathBuf,
    /// The state root: where its directory is to be made.
    pub root: PathBuf,
    /// The configuration's annotations.
    pub annotations: BTreeMap<String, String>,
    /// What the agent is asked for.
    pub create: Create,
    /// The block devices of the host that it is given.
    pub blocks: Vec<HostBlock>,
    /// Its network.
    pub network: network::Wanted,
    /// The hooks that run on the host.
    pub hooks: HostHooks,
    /// Whether it lives on without its client once it stands: it is then started by another command, and what it
    /// leaves is kept until it is deleted.
    pub detached: bool,
    /// The process on the host that stands for it, where that is not the monitor: the monitor's own affair.
    #[serde(skip)]
    pub stand_in: Option<u32>,
    /// Where the master of the process's terminal is sent.
    pub console_socket: Option<PathBuf>,
    /// The cgroup of the host to be in.
    pub cgroup: Option<Cgroup>,
}

/// A machine to be.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MachinePlan {
    /// The `sandbox-vmm` to start.
    pub vmm: PathBuf,
    /// What it is told.
    pub config: VmConfig,
    /// How long things may take.
    pub times: Times,
    /// Whether the loopback of its network namespace on the host leads into the guest.
    pub takes_loopback: bool,
    /// Whether the machine's log is shown.
    pub debug: bool,
}

/// What a container brings to a pod.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PodPlan {
    /// The container whose machine it is.
    pub sandbox: SandboxId,
    /// What the machine is to share besides.
    pub shares: Vec<ShareEntry>,
}

/// How long the parts of a sandbox's life may take.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Times {
    /// From the start of the machine to the agent's first word; and each of the agent's answers after that.
    pub answer: Duration,
    /// The process itself; none: as long as it likes.
    pub run: Option<Duration>,
}

impl Times {
    /// What [`Times::answer`] is unless told otherwise. A busy host starts machines ten times slower than an
    /// idle one, and on the software machine an idle one takes about a second.
    pub const DEFAULT_ANSWER: Duration = Duration::from_secs(60);
}

impl Plan {
    /// What the host shares for the container.
    pub fn shares(&self) -> &[ShareEntry] {
        match &self.home {
            Home::Own(machine) => &machine.config.shares,
            Home::Pod(pod) => &pod.shares,
        }
    }
}

impl ContainerPlan {
    /// Its state directory.
    pub fn directory(&self) -> PathBuf {
        self.root.join(self.id.as_str())
    }

    /// Whether its process has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.create.spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false)
    }

    /// What it shows of itself at first.
    pub fn record(&self, sandbox: Option<SandboxId>) -> Record {
        Record {
            oci_version: OCI_VERSION.into(),
            id: self.id.clone(),
            status: Status::Creating,
            pid: self.stand_in.unwrap_or_else(std::process::id),
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            cgroup: self.cgroup.clone(),
            sandbox,
            network: self.network.clone(),
            annotations: self.annotations.clone(),
            created: rfc3339(SystemTime::now()),
            machine: None,
            machine_pid: None,
            poststop: self.hooks.poststop.clone(),
            kept: false,
            out_of_memory: false,
        }
    }
}

impl MachinePlan {
    /// Whether the guest can change anything on the host that it has to sync before its power goes.
    pub fn writes_to_host(&self) -> bool {
        self.config.shares.iter().any(|share| !share.read_only)
            || self.config.disks.iter().any(|d| !d.read_only)
    }
}
