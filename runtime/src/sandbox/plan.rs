//! All that a driver needs to know, decided before anything is made.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use sandbox_protocol::Create;
use sandbox_vmm_api::VmConfig;
use serde::{Deserialize, Serialize};

use crate::hooks::HostHooks;
use crate::network;
use crate::state::SandboxId;

/// A sandbox to be.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Plan {
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
    /// The `sandbox-vmm` to start.
    pub vmm: PathBuf,
    /// The machine.
    pub machine: VmConfig,
    /// The container.
    pub create: Create,
    /// Its network.
    pub network: network::Wanted,
    /// The hooks that run on the host.
    pub hooks: HostHooks,
    /// How long things may take.
    pub times: Times,
    /// Whether the sandbox lives on without its client once the container stands: it is then started by another
    /// command, and what it leaves is kept until it is deleted.
    pub detached: bool,
    /// The process on the host that stands for the container, where that is not the monitor: the monitor's own
    /// affair.
    #[serde(skip)]
    pub stand_in: Option<u32>,
    /// Where the master of the process's terminal is sent.
    pub console_socket: Option<PathBuf>,
    /// The cgroup of the host to be in, from the mount of each hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Whether the machine's log is shown.
    pub debug: bool,
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
    /// Its state directory.
    pub fn directory(&self) -> PathBuf {
        self.root.join(self.id.as_str())
    }

    /// Whether the guest can change anything on the host that it has to sync before its power goes.
    pub fn writes_to_host(&self) -> bool {
        self.machine.shares.iter().any(|share| !share.read_only)
            || self.machine.disks.iter().any(|d| !d.read_only)
    }
}
