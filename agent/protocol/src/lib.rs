//! The frames between the runtime and the agent.
//!
//! Only the guest dials. Over vsock, the agent connects to the host (CID 2):
//!
//! - once to [`CONTROL_PORT`]: it sends [`Hello`], then reads [`Request`]s and writes [`Reply`]s and
//!   [`Event`]s;
//! - once to [`STREAM_PORT`] for every standard stream of a process that carries anything, and for every connection
//!   into the guest that the host has asked for: it sends one [`StreamHello`] frame, and from then on the connection
//!   carries that stream's bytes and nothing else. The end of a stream is the end of its direction (`shutdown`).
//!
//! A frame is a 32-bit little-endian length and that many bytes of JSON; see [`frame`]. Each side treats the
//! other as hostile: lengths are checked before anything is allocated, and an id that one side sends back is
//! looked up, never used as a path.

pub mod frame;

mod network;
mod processes;
mod stats;

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

pub use network::{Address, Interface, Mac, Neighbour, Network, Route};
pub use processes::{ProcessInfo, Processes};
pub use stats::{CpuStats, HugetlbStats, IoStats, MemoryEvents, MemoryStats, PidsStats, Stats};

/// The host port of the control connection.
pub const CONTROL_PORT: u32 = 1024;

/// The host port of stream connections.
pub const STREAM_PORT: u32 = 1025;

/// The version of this protocol. The runtime and the agent of one release speak the same; others are refused.
pub const VERSION: u32 = 2;

/// The most bytes of a frame to the guest: a `config.json` may be large.
pub const MAX_TO_GUEST_BYTES: u32 = 8 << 20;

/// The most bytes of a frame from the guest.
pub const MAX_TO_HOST_BYTES: u32 = 256 << 10;

/// The most bytes of a [`StreamHello`] frame.
pub const MAX_STREAM_HELLO_BYTES: u32 = 1 << 10;

/// Where the guest mounts the virtio-fs share.
pub const SHARE_MOUNT: &str = "/run/sandbox/share";

/// Where the guest has volumes in its own memory, each in a directory of its name.
pub const MEMORY_MOUNT: &str = "/run/sandbox/memory";

/// The first frame on the control connection: the guest is ready.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Hello {
    /// [`VERSION`] of the agent.
    pub version: u32,
    /// The guest kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// Microseconds from the kernel's start to the agent's first instruction.
    pub kernel_micros: u64,
    /// Microseconds from there to this frame.
    pub agent_micros: u64,
}

/// What the host asks of the agent.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Request {
    /// Chosen by the host; the reply carries it.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// The verbs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Call {
    /// The first request: clock, entropy, the sandbox's own names.
    Configure(Configure),
    /// Sets up the sandbox's network: its interfaces with their addresses, routes and neighbours. It may be asked
    /// for again when there is more.
    Network(Box<Network>),
    /// Makes a container up to the point where its process is about to be executed.
    Create(Box<Create>),
    /// Lets the created process execute. It may be sent before the reply to `create` has come; if that fails, so
    /// does this.
    Start {
        /// The container.
        container: String,
    },
    /// Runs one more process in a running container.
    Exec(Box<Exec>),
    /// Sends a signal to a process, or to all processes of a container.
    Signal {
        /// The container.
        container: String,
        /// The process; empty: the container's first.
        #[serde(default)]
        process: String,
        /// The signal's number on x86-64 Linux.
        signal: i32,
        /// Whether to signal every process of the container.
        #[serde(default)]
        all: bool,
    },
    /// Sets the window size of a process's terminal.
    Resize {
        /// The container.
        container: String,
        /// The process; empty: the container's first.
        #[serde(default)]
        process: String,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Holds every process of a running container. Done when all of them stand still; a container that does not
    /// come to rest goes on, and the request has failed.
    Pause {
        /// The container.
        container: String,
    },
    /// Lets the processes of a paused container go on.
    Resume {
        /// The container.
        container: String,
    },
    /// Changes the limits of a container that has not stopped. What is absent, or 0 where the configuration means
    /// "unset" by that, stays as it is; so do the device rules. All of it is carried out or nothing.
    Update {
        /// The container.
        container: String,
        /// The new limits.
        resources: Box<LinuxResources>,
    },
    /// Lists the processes of a container: [`Outcome::Processes`].
    Processes {
        /// The container.
        container: String,
    },
    /// Reads what a container uses: [`Outcome::Stats`].
    Stats {
        /// The container.
        container: String,
    },
    /// Connects to a port at the loopback addresses of the guest, 127.0.0.1 or else ::1, and dials a
    /// [`Stream::Connection`] for it. Done when both stand; failed where nobody listens.
    Connect {
        /// The TCP port.
        port: u16,
        /// Chosen by the host: what the stream calls itself, as its `process`.
        connection: u64,
    },
    /// Removes a stopped container, and forgets its files, which the host has taken away.
    Delete {
        /// The container.
        container: String,
        /// The directory of the share that it had for itself.
        #[serde(default)]
        share: Option<String>,
    },
    /// Syncs and powers the guest off. There is no reply: the machine goes.
    PowerOff,
}

/// What every guest is told first.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Configure {
    /// The host's wall clock, in nanoseconds since the epoch.
    pub time_ns: u64,
    /// Entropy for the guest's pool, base64.
    pub entropy: String,
    /// The guest's own host name.
    pub hostname: String,
    /// Whether the machine has the virtio-fs share, to be mounted at [`SHARE_MOUNT`].
    pub share: bool,
    /// What every [`StreamHello`] has to have in it.
    #[serde(default)]
    pub stream_secret: String,
}

/// A container to make.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Create {
    /// The container's id.
    pub container: String,
    /// The validated OCI configuration. Every host path in it has been replaced by the guest path at which the
    /// share, or a volume in the guest's memory, shows it: `root.path` and the sources of bind mounts.
    pub spec: Spec,
    /// Where writes to the root file system go.
    pub root: RootWrites,
    /// A user to resolve in the container's own `/etc/passwd` and `/etc/group`, as `name|uid[:group|gid]`,
    /// instead of `process.user`.
    #[serde(default)]
    pub user: Option<String>,
    /// Which of the process's streams the host wants.
    pub streams: Streams,
    /// The namespaces that it shares with other containers. The configuration does not mention them.
    #[serde(default)]
    pub joined: Vec<Joined>,
    /// The block devices of the host that it is given. The configuration has them by their numbers on the host.
    #[serde(default)]
    pub devices: Vec<BlockDevice>,
    /// The volumes in the guest's memory that it mounts.
    #[serde(default)]
    pub volumes: Vec<MemoryVolume>,
}

/// A volume in the guest's memory: made for the first container that mounts it, it stays for as long as the guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct MemoryVolume {
    /// Its directory in [`MEMORY_MOUNT`].
    pub name: String,
    /// The bytes that it may hold, if the guest has that much memory.
    pub bytes: u64,
    /// The directories that it has to have: itself, whose path is empty, and each one after those that lead to it.
    pub directories: Vec<Directory>,
}

/// A directory that is made where there is none.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Directory {
    /// Its path in what it belongs to.
    pub path: PathBuf,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its permissions.
    pub mode: u32,
}

/// A block device of the host that a container is given.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct BlockDevice {
    /// Its number on the host, as the configuration has it.
    pub major: u32,
    /// Its number on the host, as the configuration has it.
    pub minor: u32,
    /// The file at the top of the share that is the device.
    pub file: String,
    /// Whether it cannot be written to.
    pub read_only: bool,
    /// The bytes of its sectors, as programs see them.
    pub sector_bytes: u32,
}

/// A namespace that a container shares with another one.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Joined {
    /// Its type.
    pub kind: LinuxNamespaceType,
    /// The other container, which runs or is created.
    pub container: String,
}

/// Where writes to a root file system go.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootWrites {
    /// Through the share to the host.
    Through,
    /// To an overlay in guest memory, which vanishes with the guest.
    Overlay,
}

/// One more process for a running container.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Exec {
    /// The container.
    pub container: String,
    /// The new process's id, unique in the container, not empty.
    pub process: String,
    /// What to run.
    pub spec: Process,
    /// Which of the process's streams the host wants.
    pub streams: Streams,
}

/// Which standard streams of a process are carried; the others are `/dev/null`.
///
/// With `process.terminal` there is one connection, [`Stream::Terminal`], whatever this says.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Streams {
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
}

/// The first frame on a stream connection.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct StreamHello {
    /// The container; empty: it is a connection into the guest.
    pub container: String,
    /// The process; empty: the container's first. Of a connection, its number.
    #[serde(default)]
    pub process: String,
    /// Which of its streams.
    pub stream: Stream,
    /// [`Configure::stream_secret`]. Vsock has no namespaces: any process of a container can dial the host, and
    /// knows everything here but this.
    #[serde(default)]
    pub secret: String,
}

/// A stream, mostly of a process.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
    /// Both directions: the master of the process's terminal.
    Terminal,
    /// Both directions: a TCP connection that [`Call::Connect`] asked for. It is of no process.
    Connection,
}

/// What the agent sends after [`Hello`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FromAgent {
    /// The answer to a request.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// How it went.
    pub outcome: Outcome,
}

/// How a request went.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Carried out. `create`, `start` and `exec` are done when the process stands or runs, and the streams
    /// asked for have been dialled.
    Done,
    /// The answer to `processes`.
    Processes(Processes),
    /// The answer to `stats`.
    Stats(Box<Stats>),
    /// Refused or failed, with nothing left of it in the guest.
    Failed(Failure),
}

/// Why a request failed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Failure {
    /// The kind, for exit codes.
    pub kind: FailureKind,
    /// What was being done, to what, and why it failed.
    pub message: String,
}

/// The kinds of failure that callers tell apart.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The program does not exist (exit code 127).
    CommandNotFound,
    /// The program cannot be executed (exit code 126).
    CommandNotExecutable,
    /// The user does not exist in the container.
    UnknownUser,
    /// No such container or process.
    NotFound,
    /// Anything else.
    Other,
}

/// What happens in the guest without being asked.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A process ended, and all its output has been handed to the streams.
    Exited {
        /// The container.
        container: String,
        /// The process; empty: the container's first.
        #[serde(default)]
        process: String,
        /// How it ended.
        status: ExitStatus,
        /// Whether the container's memory limit killed something in it.
        #[serde(default)]
        out_of_memory: bool,
        /// Anything a reader may want to know besides, such as counters.
        #[serde(default)]
        details: BTreeMap<String, u64>,
    },
    /// An output of a process has ended without a connection: nothing came of it, or none could be had for what did.
    SilentEnd {
        /// The container.
        container: String,
        /// The process; empty: the container's first.
        #[serde(default)]
        process: String,
        /// Which of its outputs.
        stream: Stream,
        /// Why what came of it is lost, if anything did.
        #[serde(default)]
        lost: Option<String>,
    },
    /// The kernel has killed at least one process of a container for lack of memory since the last of these. The
    /// container may live on; if it does not, this comes before its end.
    OutOfMemory {
        /// The container.
        container: String,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitStatus {
    /// It returned this code, 0 to 255.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The exit code that a shell would report: the code, or 128 + the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}
