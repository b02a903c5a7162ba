//! Containers.
//!
//! The agent clones a child into the container's namespaces and cgroup. The child, a copy of the agent, sets
//! itself up ([`init`]; [`join`] for one more process of a running container), reports over its [`channel`] and
//! executes the workload as itself: there is no helper process and no second program.
//!
//! | phase | module |
//! |---|---|
//! | what can be had at all | [`namespaces`], [`user_namespace`] |
//! | limits and accounting | [`cgroup`], [`limits`], [`device_filter`], [`update`], [`stats`], [`processes`] |
//! | root and mounts | [`rootfs`], [`mounts`], [`mount_options`], [`devices`], [`block`], [`volumes`], [`hidden`] |
//! | kernel settings | [`sysctl`], [`network`], [`time`] |
//! | the process | [`program`], [`rights`], [`workload`], [`user`], [`capabilities`], [`seccomp`], [`filter_program`], [`rlimits`], [`scheduling`], [`hooks`], [`command`], [`terminal`] |

pub mod cgroup;
pub mod channel;
pub mod network;
pub mod processes;
pub mod stats;

mod beneath;
mod block;
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
mod mounts_kept;
mod namespaces;
mod program;
mod rights;
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
mod user_namespace;
mod volumes;
mod workload;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use oci_spec::runtime::{LinuxNamespaceType, Process as OciProcess, Spec};
use rustix::process::{Pid, WaitId, WaitIdOptions};
use rustix::thread::ThreadNameSpaceType;
use sandbox_protocol::Create;

use crate::pause::Turn;
use crate::power;
use crate::process::{Process, Serial};
use crate::stdio::ChildStdio;
pub use block::{LoopDevice, attach as attach_devices};
use cgroup::{Cgroup, CgroupError};
use clone::{Cloned, clone_into};
use filter_program::Program;
pub use mounts_kept::KeptMounts;
use namespaces::NamespaceError;
pub use namespaces::Namespaces;
use rights::RightsError;
use rootfs::RootError;
use scheduling::{InitialCpus, SchedulingError};
use seccomp::SeccompFilterError;
use user_namespace::{UserNamespace, UserNamespaceError};
pub use volumes::make as make_volumes;

/// A container that stands, runs, or has stopped and not been deleted.
#[derive(Debug)]
pub struct Container {
    /// Its configuration, of which later processes inherit parts.
    pub spec: Spec,
    /// Its namespaces, which later processes join.
    namespaces: Namespaces,
    /// The filter of system calls of all its processes, compiled once: an engine's names hundreds of them, for three
    /// architectures.
    filter: Option<Program>,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its mounts, which go before the devices that they may be of.
    _mounts: Option<KeptMounts>,
    /// The block devices of the host that it was given, for as long as it is there.
    _devices: Vec<LoopDevice>,
    /// Its first process, which may have ended.
    pub init: Serial,
    /// On its way to a pause, or out of one.
    pub turn: Option<Turn>,
    /// How many kills for lack of memory the host knows of.
    pub oom_kills_told: u64,
}

impl Container {
    /// A container whose first process has been cloned.
    pub fn new(
        create: Create,
        mounts: Option<KeptMounts>,
        devices: Vec<LoopDevice>,
        namespaces: Namespaces,
        filter: Option<Program>,
        cgroup: Cgroup,
        init: Serial,
    ) -> Self {
        let spec = create.spec;
        Self {
            spec,
            namespaces,
            filter,
            cgroup,
            _mounts: mounts,
            _devices: devices,
            init,
            turn: None,
            oom_kills_told: 0,
        }
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
    /// The configuration has no process.
    #[error("config.json has no process")]
    NoProcess,
    /// The configuration asks for namespaces that cannot be had.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// The cgroup could not be prepared.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The process cannot be born where it is to run.
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    /// Its user namespace could not be had.
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    /// The root that it could not put together itself could not be put together.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A setting of the network was refused.
    #[error(transparent)]
    Sysctl(#[from] sysctl::SysctlError),
    /// Its streams could not be made its own.
    #[error("cannot give the standard streams to the container's root: {0}")]
    Streams(rustix::io::Errno),
    /// What it could not take itself could not be given to it.
    #[error(transparent)]
    Rights(#[from] RightsError),
    /// The word could not be given to the child.
    #[error("cannot have the container's process set itself up: {0}")]
    Word(io::Error),
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

/// What the first process of a container is made from.
#[derive(Clone, Copy, Debug)]
pub struct First<'a> {
    /// The container's configuration.
    pub create: &'a Create,
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Those that it shares with other containers.
    pub shared: &'a [Shared],
    /// Its filter of system calls.
    pub filter: Option<&'a Program>,
    /// Its cgroup.
    pub cgroup: &'a Cgroup,
}

/// A namespace of another container, which a new one shares: a descriptor of that one's first process.
#[derive(Debug)]
pub struct Shared {
    /// Its type.
    pub kind: LinuxNamespaceType,
    /// The process that is in it.
    pub process: OwnedFd,
}

/// The namespaces that a container is to have, checked.
///
/// # Errors
///
/// They cannot be had.
pub fn namespaces_of(create: &Create) -> Result<Namespaces, NamespaceError> {
    let configured = create.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
    Namespaces::of(configured.unwrap_or_default(), &create.joined)
}

/// Makes a new container's cgroup the container's own, where its root is an ordinary user of the guest and yet is to
/// make cgroups below it.
pub fn delegate(spec: &Spec, namespaces: Namespaces, cgroup: &Cgroup) -> Result<(), SpawnError> {
    match user_namespace_of(spec, namespaces)? {
        Some(user) if namespaces.has(LinuxNamespaceType::Cgroup) && mounts::cgroup_is_writable(spec) => {
            Ok(cgroup.give_to(user.root())?)
        }
        _ => Ok(()),
    }
}

/// The filter of system calls that a container is to have, compiled.
///
/// # Errors
///
/// It cannot be made.
pub fn filter_of(spec: &Spec) -> Result<Option<Program>, SeccompFilterError> {
    spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()).map(seccomp::compile).transpose()
}

/// Clones the first process of a container.
pub fn spawn_init(first: &First<'_>, stdio: ChildStdio) -> Result<Spawned, SpawnError> {
    let First { create, namespaces, shared, cgroup, .. } = *first;
    let process = create.spec.process().as_ref().ok_or(SpawnError::NoProcess)?;
    let user = user_namespace_of(&create.spec, namespaces)?;
    let made_outside = match user {
        Some(_) => rootfs::overlay_for_others(&create.spec, create.root)?,
        None => None,
    };
    give_streams(&stdio, user)?;
    if init::shares_network_without_power(namespaces) {
        sysctl::write_for_network(create.spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref()))?;
    }
    let (agent_end, child_end) = channel::pair().map_err(SpawnError::Channel)?;
    let pids = shared.iter().find(|shared| shared.kind == LinuxNamespaceType::Pid);
    let born_into = PidNamespace::enter(pids.map(|pids| &pids.process))?;
    // SAFETY: the agent has one thread.
    let cloned = unsafe { clone_into(namespaces.clone_flags(), cgroup.as_fd()) };
    if let Ok(Cloned::Child) = cloned {
        become_child(&child_end, &stdio, shared.iter().map(|shared| &shared.process).chain(&made_outside));
        init::run(first, made_outside, &child_end, &stdio)
    }
    born_into.leave()?;
    match cloned.map_err(SpawnError::Clone)? {
        Cloned::Parent { pid, pidfd } => raise(Spawned { pid, pidfd, channel: agent_end }, process, user),
        Cloned::Child => Err(SpawnError::Clone(io::ErrorKind::Other.into())),
    }
}

/// Clones one more process of a running container.
pub fn spawn_exec(
    container: &Container,
    init: &Process,
    process: &OciProcess,
    stdio: ChildStdio,
) -> Result<Spawned, SpawnError> {
    let namespaces = container.namespaces;
    give_streams(&stdio, user_namespace_of(&container.spec, namespaces)?)?;
    let (agent_end, child_end) = channel::pair().map_err(SpawnError::Channel)?;
    let home = container.cgroup.home_of(init.pid)?;
    let born_into = PidNamespace::enter(namespaces.has_pids().then_some(&init.pidfd))?;
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
        become_child(&child_end, &stdio, Some(&init.pidfd));
        join::run(container, process, &init.pidfd, &child_end, &stdio)
    }
    born_on.leave();
    born_into.leave()?;
    match cloned.map_err(SpawnError::Clone)? {
        Cloned::Parent { pid, pidfd } => Ok(Spawned { pid, pidfd, channel: agent_end }),
        Cloned::Child => Err(SpawnError::Clone(io::ErrorKind::Other.into())),
    }
}

/// Gives a child what it cannot take itself, and the word to set itself up; or ends it.
fn raise(
    child: Spawned,
    process: &OciProcess,
    user: Option<UserNamespace<'_>>,
) -> Result<Spawned, SpawnError> {
    let given = rights::give(Some(child.pid), process).map_err(SpawnError::from).and_then(|()| {
        user.map_or(Ok(()), |user| user.map(child.pid))?;
        channel::let_go(&child.channel).map_err(SpawnError::Word)
    });
    match given {
        Ok(()) => Ok(child),
        Err(error) => {
            // Waited for, so that nobody finds its cgroup occupied.
            let _ = signal(&child.pidfd, libc::SIGKILL);
            let _ = rustix::process::waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED);
            Err(error)
        }
    }
}

/// The streams belong to the container's root, which gives them to its user.
fn give_streams(stdio: &ChildStdio, user: Option<UserNamespace<'_>>) -> Result<(), SpawnError> {
    let (Some(user), ChildStdio::Files(files)) = (user, stdio) else { return Ok(()) };
    let root = user.root();
    files
        .iter()
        .try_for_each(|stream| workload::give(stream.as_fd(), root.uid, Some(root.gid)))
        .map_err(SpawnError::Streams)
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

fn user_namespace_of(
    spec: &Spec,
    namespaces: Namespaces,
) -> Result<Option<UserNamespace<'_>>, UserNamespaceError> {
    namespaces.has(LinuxNamespaceType::User).then(|| UserNamespace::of(spec)).transpose()
}

/// While this lives, children of the agent are born into a container's pid namespace.
struct PidNamespace {
    home: Option<OwnedFd>,
}

impl PidNamespace {
    /// Of this process; none: the agent's own.
    fn enter(process: Option<&OwnedFd>) -> Result<Self, SpawnError> {
        let Some(process) = process else { return Ok(Self { home: None }) };
        let this = rustix::process::getpid();
        let home = rustix::process::pidfd_open(this, rustix::process::PidfdFlags::empty())
            .map_err(SpawnError::PidNamespace)?;
        move_into(process)?;
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
fn become_child<'a>(channel: &'a OwnedFd, stdio: &ChildStdio, others: impl IntoIterator<Item = &'a OwnedFd>) {
    power::is_child();
    program::map();
    let mut kept: Vec<RawFd> = others.into_iter().chain([channel]).map(AsRawFd::as_raw_fd).collect();
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
