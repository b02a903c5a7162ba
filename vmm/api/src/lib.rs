//! What the runtime and `sandbox-vmm` say to each other.
//!
//! The runtime starts `sandbox-vmm` with
//!
//! - a [`VmConfig`] as JSON on standard input, read to its end;
//! - one end of a stream socket pair as descriptor [`EVENT_FD`]: the VMM writes a [`VmEvent`] as one line of
//!   JSON each, and stops the machine when the peer closes (so a machine never outlives its runtime);
//! - standard error for its log.
//!
//! While it runs, the VMM answers one [`ControlRequest`] line with one [`ControlReply`] line on the unix
//! socket [`VmConfig::control_socket`].
//!
//! The types here know nothing of containers or OCI: a share entry is a directory, not a volume.

pub mod socket;

use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The descriptor on which `sandbox-vmm` finds its event socket.
pub const EVENT_FD: i32 = 3;

/// The first of the descriptors that taps are inherited under.
pub const FIRST_TAP_FD: i32 = EVENT_FD + 1;

/// The extension, in place of the control socket's, of the name that the way to QEMU's vsock device has during a start.
pub const VSOCK_LINK: &str = "vsock";

/// The same of the way to its file device.
pub const SHARE_LINK: &str = "share";

/// The virtio-fs tag of the one share of a machine.
pub const SHARE_TAG: &str = "share";

/// How the file begins that the share has for a block device; its number follows. An entry of a share has no such name.
pub const BLOCK_FILE_PREFIX: &str = "@block";

/// The most block devices of a machine at a time.
pub const MAX_BLOCKS: usize = 256;

/// The least guest memory that the guest kernel and agent boot in, in MiB.
pub const MIN_MEMORY_MIB: u32 = 48;

/// The most guest memory that the address layout has room for, in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u32 = 1 << 20;

/// The most vCPUs of a machine: xAPIC identifiers have 8 bits and 255 is the broadcast.
pub const MAX_VCPUS: u8 = 254;

/// The I/O port by which the guest powers its machine off: a write of [`POWER_OFF_VALUE`] ends it.
///
/// A machine without ACPI has no power-off of its own. The port is that of QEMU's `isa-debug-exit` device, so
/// that both machines have the same.
pub const POWER_OFF_PORT: u16 = 0x501;

/// The byte that the agent writes to [`POWER_OFF_PORT`] after it has synced everything.
pub const POWER_OFF_VALUE: u8 = 0x2a;

/// Where the guest kernel leaves its last words when it panics: `ramoops` writes the end of its log into the
/// last [`PANIC_LOG_BYTES`] of the guest's low memory, which the kernel is told to keep out of.
pub const PANIC_LOG_BYTES: u64 = 64 * 1024;

/// A virtual machine, as the runtime asks for it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Which machine to run.
    #[serde(default)]
    pub machine: MachineChoice,
    /// The guest kernel: an uncompressed x86-64 ELF image with a PVH entry.
    pub kernel: PathBuf,
    /// The guest image: an uncompressed initramfs.
    pub image: PathBuf,
    /// Guest memory in MiB, from [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// vCPUs, from 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Words added to the kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// The vsock device.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// What the virtio-fs device shows, each entry at its own place; none: no device.
    #[serde(default)]
    pub shares: Vec<ShareEntry>,
    /// virtio-blk devices, in the order in which the guest numbers them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// virtio-net devices, in the order in which the guest numbers them.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Whether there is a balloon with free-page reporting, by which the guest gives memory back.
    #[serde(default)]
    pub balloon: bool,
    /// A file that takes what the guest writes to its serial console; none: the machine has no serial port.
    #[serde(default)]
    pub console: Option<PathBuf>,
    /// Where the control socket is made. While QEMU is being started there are two other sockets beside it, with the
    /// extensions [`VSOCK_LINK`] and [`SHARE_LINK`]: a process that is killed then leaves them.
    pub control_socket: PathBuf,
    /// What devices do at most.
    #[serde(default)]
    pub rates: Rates,
    /// Whose processes the machine's are; none: the caller's, and those of QEMU nobody's.
    #[serde(default)]
    pub ids: Option<ProcessIds>,
    /// Whether entries that the guest may write to can be added to the share while the machine runs.
    #[serde(default)]
    pub writable_later: bool,
}

/// The ids that the processes of a machine take, each for its user and its group. Nobody else is to have them.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessIds {
    /// Those of `sandbox-vmm`. The directory of the vsock sockets and those in it are to be open to this group.
    pub vmm: u32,
    /// Those of QEMU.
    pub qemu: u32,
}

/// What each device of a kind does for its guest at most.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// The vsock device: packets, and their bytes.
    #[serde(default)]
    pub vsock: RateLimit,
    /// The virtio-fs device: requests, and the bytes of requests and replies.
    #[serde(default)]
    pub share: RateLimit,
    /// Each virtio-blk device: requests, and their bytes.
    #[serde(default)]
    pub disks: RateLimit,
    /// Each virtio-net device: frames, and their bytes. On [`MachineChoice::Qemu`] there can be none.
    #[serde(default)]
    pub nets: RateLimit,
}

/// What a device does in a second; what is not said is not limited.
///
/// A second that was not used up is saved for the next, and no more than one.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Operations.
    #[serde(default)]
    pub operations_per_second: Option<NonZeroU64>,
    /// Bytes, in both directions together.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
}

impl RateLimit {
    /// Whether there is no limit at all.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// Which machine to run the guest on.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineChoice {
    /// KVM where a probe finds it fast enough, else QEMU.
    #[default]
    Auto,
    /// KVM, or an error that says why not.
    Kvm,
    /// QEMU's TCG.
    Qemu,
}

/// The machine that runs the guest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// Our own VMM on the host's KVM.
    Kvm,
    /// QEMU's TCG, with our vsock and virtio-fs devices.
    Qemu,
}

impl MachineKind {
    /// Its name, as configurations and command lines have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// The vsock device, in Firecracker's hybrid mode.
///
/// A connection of the guest to host port P arrives at the unix socket `<socket>_P`, where a host program
/// listens. A host program that wants guest port P connects to `<socket>`, writes `CONNECT P\n` and reads
/// `OK <its port>\n`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// The unix socket; its directory holds the `_P` sockets too and nothing else.
    pub socket: PathBuf,
}

/// A host directory or file that the guest sees through virtio-fs.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShareEntry {
    /// Where it appears in the share: a relative path of plain names.
    pub path: PathBuf,
    /// The host directory or regular file, absolute.
    pub source: PathBuf,
    /// Whether the host refuses every write to it and below it, mounts inside it included.
    pub read_only: bool,
    /// The ids that its files have for the guest, where they are others than the host's.
    #[serde(default)]
    pub id_map: Option<IdMap>,
}

/// Which ids on the disk are which for the guest. A file of an id that is in no range belongs to nobody.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IdMap {
    /// Of users.
    pub uids: Vec<IdRange>,
    /// Of groups.
    pub gids: Vec<IdRange>,
    /// Whether it holds for mounts inside too.
    pub recursive: bool,
}

/// A range of ids.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// The first on the disk.
    pub on_disk: u32,
    /// The first for the guest.
    pub in_guest: u32,
    /// How many.
    pub count: u32,
}

/// A raw disk image or block device.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image; its format is raw whatever its content looks like.
    pub path: PathBuf,
    /// Whether writes are refused, on the host side.
    pub read_only: bool,
}

/// A network interface.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its other end.
    pub tap: TapSource,
    /// The guest's MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
}

/// The tap device of a network interface.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TapSource {
    /// An existing one, of this name, in the network namespace of `sandbox-vmm`.
    Name(String),
    /// One that `sandbox-vmm` inherits attached, under this number, from [`FIRST_TAP_FD`] on. It may be in any
    /// network namespace, frames have the virtio-net header, and it goes when the machine does.
    Descriptor(i32),
}

/// What the VMM reports, in this order: at most one `Running`, exactly one `Exited`.
///
/// A VMM that dies closes the socket without `Exited`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum VmEvent {
    /// The vCPUs are running.
    Running {
        /// The machine that runs the guest.
        machine: MachineKind,
        /// Why this machine: the probe's finding, or that it was asked for.
        reason: String,
        /// Where the time went until here.
        timings: Vec<Timing>,
    },
    /// The machine is gone.
    Exited {
        /// Why.
        reason: ExitReason,
    },
}

/// A step of a start and the time it took.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Timing {
    /// What was done.
    pub step: String,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// Why a machine ended.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset, and not because of a panic.
    Reset,
    /// The guest's CPU gave up: a fault in the handler of a double fault. On the software machine this cannot
    /// be told from a reset.
    TripleFault,
    /// The guest kernel panicked.
    Panic {
        /// The end of its log, oldest line first, printable characters only. At most 64 lines.
        console: Vec<String>,
    },
    /// The host stopped it: a stop request, or the runtime closed the event socket.
    Stopped,
    /// It could not be started, or not run on.
    Failed {
        /// What failed, on what, why, and what to do.
        message: String,
    },
}

/// A request on the control socket: one line of JSON.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlRequest {
    /// What the machine is doing.
    State,
    /// Stop all vCPUs where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Counters of the machine.
    Statistics,
    /// Show the guest a block device as a file of its share, [`block_file`]. Its descriptor comes with the request, and
    /// says by how it is open whether the guest may write.
    AddBlock,
    /// Take a block device away. A guest that has it open can do nothing with it any more.
    RemoveBlock {
        /// Its number.
        number: u64,
    },
    /// End the machine at once, as if its power had been cut.
    Stop,
}

/// The answer to a [`ControlRequest`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum ControlReply {
    /// Done.
    Done,
    /// The answer to `State`.
    State {
        /// Whether the vCPUs run.
        state: VmState,
        /// The machine.
        machine: MachineKind,
    },
    /// The answer to `Statistics`.
    Statistics(Statistics),
    /// The answer to `AddBlock`.
    Block {
        /// Its number, which none had before.
        number: u64,
    },
    /// The request could not be carried out.
    Error {
        /// Why.
        message: String,
    },
}

/// The name of the file that the share has for a block device.
pub fn block_file(number: u64) -> String {
    format!("{BLOCK_FILE_PREFIX}{number}")
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// The vCPUs run.
    Running,
    /// The vCPUs are held.
    Paused,
}

/// Counters since the machine started.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub struct Statistics {
    /// Guest memory that is resident on the host, in bytes.
    pub memory_resident_bytes: u64,
    /// Memory that the guest has given back by free-page reporting so far, in bytes.
    pub memory_reported_bytes: u64,
    /// vCPU exits to the VMM (KVM only).
    pub vcpu_exits: u64,
    /// Per device, by name (`vsock`, `fs`, `blk0`, `net0`, `rng`): counters of its own.
    pub devices: std::collections::BTreeMap<String, std::collections::BTreeMap<String, u64>>,
}

/// What `sandbox-vmm probe` prints: which machines this host can run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Probe {
    /// The machine that `auto` takes, if any.
    pub auto: Option<MachineKind>,
    /// Why.
    pub reason: String,
    /// Whether KVM is usable.
    pub kvm: ProbedMachine,
    /// Whether QEMU is usable.
    pub qemu: ProbedMachine,
}

/// One machine of a [`Probe`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ProbedMachine {
    /// Whether the machine can run the guest.
    pub usable: bool,
    /// What was found, with figures.
    pub finding: String,
    /// What the user can do where it is not usable.
    pub remedy: Option<String>,
}
