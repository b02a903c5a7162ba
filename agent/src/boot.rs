//! From the first instruction to a guest that can hold containers.
//!
//! The host waits for [`Hello`], so it is sent before anything is mounted: a socket needs no file system.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::thread::ClockId;
use sandbox_protocol::{CONTROL_PORT, Hello, VERSION};

use crate::container::network;
use crate::control::{Control, ControlError};
use crate::dial::{DialError, Dialer};
use crate::kmsg;
use crate::serve::ServeError;

/// Where the guest's cgroups are.
pub const CGROUP_MOUNT: &str = "/sys/fs/cgroup";

/// The cgroup that holds those of all containers, and nothing else: that of the pod.
pub const POD_CGROUP: &str = "/sys/fs/cgroup/pod";

/// Where a container's root is put together, each in a mount namespace of its own.
pub const ROOT_STAGE: &str = "/run/sandbox/root";

/// Where the writable layer of a container's root is, likewise.
pub const LAYER_STAGE: &str = "/run/sandbox/layer";

/// Why the guest did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The host could not be dialled.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The host did not take the hello.
    #[error(transparent)]
    Hello(#[from] ControlError),
    /// A step of the guest's own set-up failed.
    #[error("cannot {step}: {source}")]
    System {
        /// What was being done.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The loop failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Microseconds since the kernel started.
pub fn since_kernel_start() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// Makes sure that descriptors 0 to 2 are taken, so that no socket becomes standard output.
///
/// A guest without a console starts with all three closed. The root directory stands in until `/dev` is there.
pub fn standard_descriptors() {
    while let Ok(fd) = rustix::fs::open("/", OFlags::PATH, Mode::empty()) {
        if std::os::fd::AsRawFd::as_raw_fd(&fd) > 2 {
            break;
        }
        std::mem::forget(fd);
    }
}

/// Connects to the host and says hello.
pub fn dial_host(dialer: Dialer, first_instruction: u64) -> Result<Control, BootError> {
    let socket = dialer.dial(CONTROL_PORT)?;
    let mut control = Control::new(socket)?;
    control.hello(&Hello {
        version: VERSION,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        kernel_micros: first_instruction,
        agent_micros: since_kernel_start().saturating_sub(first_instruction),
    })?;
    Ok(control)
}

/// Mounts what a guest needs and brings its loopback up.
pub fn system() -> Result<(), BootError> {
    leave_initial_root()?;
    for m in MOUNTS {
        m.make()?;
    }
    device_nodes()?;
    null_descriptors()?;
    enable_controllers(CGROUP_MOUNT)?;
    std::fs::create_dir(POD_CGROUP).map_err(|e| failed(format!("make {POD_CGROUP}"), e))?;
    enable_controllers(POD_CGROUP)?;
    for dir in [ROOT_STAGE, LAYER_STAGE] {
        std::fs::create_dir_all(dir).map_err(|e| failed(format!("make {dir}"), e))?;
    }
    network::loopback_up().map_err(|e| failed("bring the loopback interface up".into(), e))
}

fn failed(step: String, source: impl Into<io::Error>) -> BootError {
    BootError::System { step, source: source.into() }
}

/// Puts a bind mount of the initial root over it.
///
/// The initial root has no parent mount, and `pivot_root`, which every container needs, refuses such a root.
fn leave_initial_root() -> Result<(), BootError> {
    const STEP: &str = "put a second root over the initial one";
    let step = |e: rustix::io::Errno| failed(STEP.into(), e);
    // Any directory will do; this one is needed anyway.
    let over = "/dev";
    std::fs::create_dir_all(over).map_err(|e| failed(STEP.into(), e))?;
    mount_bind("/", over).map_err(step)?;
    rustix::process::chdir(over).map_err(step)?;
    mount_move(".", "/").map_err(step)?;
    rustix::process::chroot(".").map_err(step)?;
    rustix::process::chdir("/").map_err(step)
}

struct GuestMount {
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: &'static std::ffi::CStr,
}

const NO_PROGRAMS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const MOUNTS: &[GuestMount] = &[
    GuestMount { target: "/proc", kind: "proc", flags: NO_PROGRAMS, data: c"" },
    GuestMount { target: "/sys", kind: "sysfs", flags: NO_PROGRAMS, data: c"" },
    GuestMount { target: "/dev", kind: "devtmpfs", flags: MountFlags::NOSUID, data: c"mode=755" },
    GuestMount {
        target: "/dev/pts",
        kind: "devpts",
        flags: MountFlags::NOSUID,
        data: c"mode=620,ptmxmode=666",
    },
    GuestMount { target: "/dev/shm", kind: "tmpfs", flags: NO_PROGRAMS, data: c"mode=1777" },
    GuestMount { target: "/dev/mqueue", kind: "mqueue", flags: NO_PROGRAMS, data: c"" },
    GuestMount {
        target: "/run",
        kind: "tmpfs",
        flags: NO_PROGRAMS.difference(MountFlags::NOEXEC),
        data: c"mode=755",
    },
    GuestMount { target: "/tmp", kind: "tmpfs", flags: NO_PROGRAMS, data: c"mode=1777" },
    GuestMount { target: CGROUP_MOUNT, kind: "cgroup2", flags: NO_PROGRAMS, data: c"" },
];

impl GuestMount {
    fn make(&self) -> Result<(), BootError> {
        let _ = std::fs::create_dir(self.target);
        self.mount(self.kind)
            .or_else(|e| match self.kind {
                // A kernel without devtmpfs: the nodes are made by hand.
                "devtmpfs" => self.mount("tmpfs"),
                _ => Err(e),
            })
            .map_err(|e| failed(format!("mount {} at {}", self.kind, self.target), e))
    }

    fn mount(&self, kind: &str) -> rustix::io::Result<()> {
        mount(kind, self.target, kind, self.flags, self.data)
    }
}

/// The device nodes that the agent and its containers use, by name, major and minor.
const NODES: [(&str, u32, u32); 8] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("kmsg", 1, 11),
    ("tty", 5, 0),
    ("ptmx", 5, 2),
];

fn device_nodes() -> Result<(), BootError> {
    for (name, major, minor) in NODES {
        let path = Path::new("/dev").join(name);
        let device = rustix::fs::makedev(major, minor);
        match rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::from(0o666), device) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(failed(format!("make the device node {}", path.display()), e)),
        }
    }
    Ok(())
}

/// Standard input and output become `/dev/null`, standard error the kernel's log.
fn null_descriptors() -> Result<(), BootError> {
    let open = |path: &str| {
        rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
            .map_err(|e| failed(format!("open {path}"), e))
    };
    let null = open("/dev/null")?;
    replace_standard(null.as_fd())
}

fn replace_standard(null: BorrowedFd<'_>) -> Result<(), BootError> {
    let step = |e: rustix::io::Errno| failed("replace the standard descriptors".into(), e);
    rustix::stdio::dup2_stdin(null).map_err(step)?;
    rustix::stdio::dup2_stdout(null).map_err(step)?;
    match kmsg::open() {
        Ok(log) => rustix::stdio::dup2_stderr(log).map_err(step),
        Err(_) => rustix::stdio::dup2_stderr(null).map_err(step),
    }
}

/// Makes the settings of the whole machine: memory that is only asked for is granted, however much.
///
/// A guest has little more memory than its container may use, so the kernel's own guess would refuse what it
/// grants on a large machine. What is really used is held by the container's limit, as everywhere.
pub fn machine() -> Result<(), BootError> {
    const SETTING: &str = "/proc/sys/vm/overcommit_memory";
    std::fs::write(SETTING, "1").map_err(|e| failed(format!("write {SETTING}"), e))
}

/// Gives every controller that a cgroup has to those below it.
fn enable_controllers(cgroup: &str) -> Result<(), BootError> {
    let list = format!("{cgroup}/cgroup.controllers");
    let control = format!("{cgroup}/cgroup.subtree_control");
    let controllers = std::fs::read_to_string(&list).map_err(|e| failed(format!("read {list}"), e))?;
    let wanted: Vec<String> = controllers.split_whitespace().map(|c| format!("+{c}")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    std::fs::write(&control, wanted.join(" ")).map_err(|e| failed(format!("write {control}"), e))
}
