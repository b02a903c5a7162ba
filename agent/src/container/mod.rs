//! Containers.
//!
//! The agent clones a child into the container's namespaces and cgroup. The child, a copy of the agent, sets
//! itself up ([`init`]; [`join`] for one more process of a running container), reports over its [`channel`] and
//! executes the workload as itself: there is no helper process and no second program.
//!
//! | phase | module |
//! |---|---|
//! | what can be had at all | [`namespaces`], [`check`] |
//! | limits and accounting | [`cgroup`], [`limits`], [`device_filter`], [`update`], [`stats`], [`processes`] |
//! | root and mounts | [`rootfs`], [`mounts`], [`mount_options`], [`devices`], [`hidden`] |
//! | kernel settings | [`sysctl`], [`network`], [`time`] |
//! | the process | [`workload`], [`user`], [`capabilities`], [`seccomp`], [`filter_program`], [`rlimits`], [`scheduling`], [`hooks`], [`command`], [`terminal`] |

pub mod cgroup;
pub mod channel;
pub mod network;
pub mod processes;
pub mod stats;

mod beneath;
mod capabilities;
mod clone;
mod command;
mod copy_up;
mod device_filter;
mod devices;
mod filter_program;
mod hidden;
mod hooks;
mod init;
mod join;
mod limits;
mod mount_options;
mod mounts;
mod namespaces;
mod rlimits;
mod rootfs;
mod scheduling;
mod seccomp;
mod setup;
mod sysctl;
mod terminal;
mod time;
mod update;
mod user;
mod workload;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use oci_spec::runtime::{LinuxNamespaceType, Process as OciProcess, Spec};
use rustix::process::Pid;
use rustix::thread::ThreadNameSpaceType;
use sandbox_protocol::Create;

use crate::pause::Turn;
use crate::power;
use crate::process::{Process, Serial};
use crate::stdio::ChildStdio;
use cgroup::{Cgroup, CgroupError};
use clone::{Cloned, clone_into};
use namespaces::{NamespaceError, Namespaces};
use scheduling::{InitialCpus, SchedulingError};

/// A container that stands, runs, or has stopped and not been deleted.
#[derive(Debug)]
pub struct Container {
    /// Its configuration, of which later processes inherit parts.
    pub spec: Spec,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its first process, which may have ended.
    pub init: Serial,
    /// On its way to a pause, or out of one.
    pub turn: Option<Turn>,
}

impl Container {
    /// A container whose first process has been cloned.
    pub fn new(spec: Spec, cgroup: Cgroup, init: Serial) -> Self {
        Self { spec, cgroup, init, turn: None }
    }
}

/// A child that was cloned.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid as the agent sees it.
    pub pid: Pid,
    /// The same, proof against reuse.
    pub pidfd: OwnedFd,
    /// The agent's end of the line to it.
    pub channel: OwnedFd,
}

/// Why a child could not be cloned.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The configuration asks for namespaces that cannot be had.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// The cgroup could not be prepared.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The process cannot be born where it is to run.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    /// The line to the child could not be made.
    #[error("cannot make the line to the container's process: {0}")]
    Channel(rustix::io::Errno),
    /// The kernel refused the clone.
    #[error("cannot clone a process into the container's namespaces and cgroup: {0}")]
    Clone(io::Error),
    /// The container's pid namespace could not be entered, or not be left.
    #[error("cannot have a process born into the container's pid namespace: {0}")]
    PidNamespace(rustix::io::Errno),
}

/// Checks what can be checked without making anything.
///
/// # Errors
///
/// The namespaces cannot be had.
pub fn check(spec: &Spec) -> Result<(), NamespaceError> {
    namespaces_of(spec).map(drop)
}

/// Clones the first process of a container.
pub fn spawn_init(create: &Create, cgroup: &Cgroup, stdio: ChildStdio) -> Result<Spawned, SpawnError> {
    let namespaces = namespaces_of(&create.spec)?;
    let (agent_end, child_end) = channel::pair().map_err(SpawnError::Channel)?;
    // SAFETY: the agent has one thread.
    let cloned = unsafe { clone_into(namespaces.clone_flags(), cgroup.as_fd()) };
    match cloned.map_err(SpawnError::Clone)? {
        Cloned::Child => {
            become_child(&child_end, &stdio, &[]);
            init::run(create, namespaces, cgroup.path(), &child_end, &stdio)
        }
        Cloned::Parent { pid, pidfd } => Ok(Spawned { pid, pidfd, channel: agent_end }),
    }
}

/// Clones one more process of a running container.
pub fn spawn_exec(
    container: &Container,
    init: &Process,
    process: &OciProcess,
    stdio: ChildStdio,
) -> Result<Spawned, SpawnError> {
    let namespaces = namespaces_of(&container.spec)?;
    let (agent_end, child_end) = channel::pair().map_err(SpawnError::Channel)?;
    let home = container.cgroup.home_of(init.pid)?;
    let born_into = PidNamespace::enter(namespaces, &init.pidfd)?;
    let born_on = match InitialCpus::take(process) {
        Ok(cpus) => cpus,
        Err(e) => {
            born_into.leave()?;
            return Err(e.into());
        }
    };
    // SAFETY: the agent has one thread.
    let cloned = unsafe { clone_into(0, home.as_fd()) };
    if let Ok(Cloned::Child) = cloned {
        become_child(&child_end, &stdio, &[init.pidfd.as_raw_fd()]);
        join::run(&container.spec, process, namespaces, &init.pidfd, &child_end, &stdio)
    }
    born_on.leave();
    born_into.leave()?;
    match cloned.map_err(SpawnError::Clone)? {
        Cloned::Parent { pid, pidfd } => Ok(Spawned { pid, pidfd, channel: agent_end }),
        Cloned::Child => Err(SpawnError::Clone(io::ErrorKind::Other.into())),
    }
}

/// Tells a child that waits to execute its program.
pub fn let_go(channel: Option<&OwnedFd>) -> io::Result<()> {
    channel.map_or(Err(io::ErrorKind::NotConnected.into()), channel::let_go)
}

/// Sends a signal to a process.
pub fn signal(process: &OwnedFd, number: i32) -> io::Result<()> {
    // rustix has names for signals only, and 0 and the real-time signals must go through too.
    // SAFETY: the call has no memory effects in this process.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), number, std::ptr::null::<u8>(), 0)
    };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn namespaces_of(spec: &Spec) -> Result<Namespaces, NamespaceError> {
    let configured = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
    Namespaces::of(configured.unwrap_or_default())
}

/// While this lives, children of the agent are born into a container's pid namespace.
struct PidNamespace {
    home: Option<OwnedFd>,
}

impl PidNamespace {
    fn enter(namespaces: Namespaces, init: &OwnedFd) -> Result<Self, SpawnError> {
        if !namespaces.has(LinuxNamespaceType::Pid) {
            return Ok(Self { home: None });
        }
        let this = rustix::process::getpid();
        let home = rustix::process::pidfd_open(this, rustix::process::PidfdFlags::empty())
            .map_err(SpawnError::PidNamespace)?;
        move_into(init)?;
        Ok(Self { home: Some(home) })
    }

    fn leave(self) -> Result<(), SpawnError> {
        self.home.as_ref().map_or(Ok(()), move_into)
    }
}

fn move_into(process: &OwnedFd) -> Result<(), SpawnError> {
    rustix::thread::move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::PROCESS_ID)
        .map_err(SpawnError::PidNamespace)
}

/// In a child: says so, and closes every descriptor but the ones it needs.
///
/// The child may wait long before it executes its program, and what it holds open would stay open: the streams
/// of other containers, for one.
fn become_child(channel: &OwnedFd, stdio: &ChildStdio, others: &[RawFd]) {
    power::is_child();
    let mut kept: Vec<RawFd> = others.to_vec();
    kept.push(channel.as_raw_fd());
    if let ChildStdio::Files(files) = stdio {
        kept.extend(files.iter().map(AsRawFd::as_raw_fd));
    }
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        close_range(first, fd - 1);
        first = fd + 1;
    }
    close_range(first, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: the descriptors belong to values of the parent's that this child never uses or drops.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}
