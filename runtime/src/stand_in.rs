//! The process that stands for a container on the host, in the eyes of an engine.
//!
//! An engine takes the process of `--pid-file` for one in the container. It kills it, waits for it, and enters
//! its mount namespace: Podman does so to copy files, and would write to the host's `/etc` if that process lived
//! among the host's mounts. So it lives among mounts of its own, which show the container's files as far as the
//! host has them: the root file system and the volumes. It is in the container's network namespace too, which engines
//! look for by it, enter and fill. Where the guest has a file system of its own, such as
//! `/proc` or a tmpfs, there is an empty directory that nothing can be written to.
//!
//! It is this same binary, started by `sandbox create` with a hidden subcommand. It starts the monitor, passes
//! the signals that it gets on to it, and ends with its exit code. When it dies, the kernel kills the monitor.
//! Its line to its client is the door: a [`View`] comes in before the monitor is started, [`FromClient::Stands`]
//! when the container stands and its mount points are there, and [`FromStandIn`] goes back.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use sandbox_protocol::frame::{self, FrameError};
use serde::{Deserialize, Serialize};

use crate::client::Signals;
use crate::descriptor::{self, Ties};
use crate::monitor::{self, MAX_LIFELINE_BYTES};
use crate::sandbox::{Ends, Plan};
use crate::spec::is_bind;
use crate::{exit, network, process};

/// The name of the hidden subcommand.
pub const SUBCOMMAND: &str = "stand-in";

/// Where it finds the monitor's end of the lifeline, and its own of the door.
const LIFELINE_FD: RawFd = 3;
const DOOR_FD: RawFd = 4;

/// Why there is no process that stands for the container.
#[derive(Debug, thiserror::Error)]
pub enum StandInError {
    /// A step failed.
    #[error("cannot {step} for the process that stands for the container: {error}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// It could not be talked to.
    #[error("cannot talk to the process that stands for the container: {0}")]
    Door(#[from] FrameError),
    /// It is gone.
    #[error("the process that stands for the container died")]
    Gone,
    /// It said what went wrong.
    #[error("{0}")]
    Failed(String),
}

fn host(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> StandInError {
    move |error| StandInError::Host { step, error: error.into() }
}

fn host_io(step: &'static str) -> impl FnOnce(io::Error) -> StandInError {
    move |error| StandInError::Host { step, error }
}

/// What an engine is to see of a container's files.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct View {
    root: PathBuf,
    read_only: bool,
    mounts: Vec<Shown>,
    network: network::Wanted,
}

/// What there is at a place in the container.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Shown {
    destination: PathBuf,
    /// Of the host; none is a file system of the guest's.
    source: Option<PathBuf>,
    read_only: bool,
}

impl View {
    fn of(plan: &Plan) -> Self {
        let spec = &plan.create.spec;
        let container = Path::new(&plan.create.container);
        let shown = |(index, mount): (usize, &oci_spec::runtime::Mount)| {
            let path = container.join("mounts").join(index.to_string());
            let share = plan.machine.shares.iter().find(|share| share.path == path);
            Shown {
                destination: mount.destination().clone(),
                source: share.filter(|_| is_bind(mount)).map(|share| share.source.clone()),
                read_only: share.is_none_or(|share| share.read_only),
            }
        };
        Self {
            root: plan.rootfs.clone(),
            read_only: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
            mounts: spec.mounts().iter().flatten().enumerate().map(shown).collect(),
            network: plan.network.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
enum FromClient {
    Stands,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
enum FromStandIn {
    Ready,
    Failed(String),
}

/// The client's end. A stand-in that is not released ends with its client.
#[derive(Debug)]
pub struct StandIn {
    child: Child,
    door: UnixStream,
}

impl StandIn {
    /// Starts one, which starts the monitor and hands it its end of the lifeline, and these streams of the process;
    /// none: ours.
    pub fn start(lifeline: &UnixStream, plan: &Plan, streams: Option<Ends>) -> Result<Self, StandInError> {
        let (mut door, theirs) = UnixStream::pair().map_err(host_io("make the door"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(SUBCOMMAND);
        if let Some(Ends { stdin, stdout, stderr }) = streams {
            command.stdin(stream(stdin)).stdout(stream(stdout)).stderr(stream(stderr));
        }
        let given = [(lifeline.as_fd(), LIFELINE_FD), (theirs.as_fd(), DOOR_FD)];
        descriptor::give(&mut command, &given, Ties::None).map_err(host_io("prepare a process"))?;
        let child = command.spawn().map_err(host_io("start a process"))?;
        drop((theirs, command));
        frame::write(&mut door, &View::of(plan), MAX_LIFELINE_BYTES)?;
        Ok(Self { child, door })
    }

    /// Lets it take its place, now that the container stands. From then on it lives on by itself.
    pub fn release(&mut self) -> Result<(), StandInError> {
        frame::write(&mut self.door, &FromClient::Stands, MAX_LIFELINE_BYTES)?;
        match frame::read(&mut self.door, MAX_LIFELINE_BYTES)? {
            Some(FromStandIn::Ready) => Ok(()),
            Some(FromStandIn::Failed(why)) => Err(StandInError::Failed(why)),
            None => Err(StandInError::Gone),
        }
    }

    /// The process.
    pub fn into_child(self) -> Child {
        self.child
    }

    /// Ends it, and with it the monitor.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    /// Waits for its end, which is the monitor's.
    pub fn wait(self) -> io::Result<ExitStatus> {
        let Self { mut child, door } = self;
        // It may be waiting for us.
        drop(door);
        child.wait()
    }
}

fn stream(end: Option<OwnedFd>) -> Stdio {
    end.map_or_else(Stdio::null, Stdio::from)
}

/// What the hidden subcommand does. Returns the exit code, which is the monitor's.
pub fn main() -> Result<u8, StandInError> {
    let lifeline = descriptor::take(LIFELINE_FD).map_err(host_io("find the lifeline"))?;
    let door = descriptor::take(DOOR_FD).map_err(host_io("find the door"))?;
    let mut door = UnixStream::from(door);
    let view: View = frame::read(&mut door, MAX_LIFELINE_BYTES)?.ok_or(StandInError::Gone)?;
    let signals = Signals::block().map_err(host_io("receive signals"))?;
    process::become_subreaper().map_err(host_io("become the reaper of the monitor's processes"))?;
    let lifeline = UnixStream::from(lifeline);
    // A namespace that cannot be entered is for the monitor to say, which looks into it.
    let home = view.network.enter().unwrap_or_default();
    let monitor = monitor::start_for_engine(&lifeline, home).map_err(host_io("start the monitor"))?;
    drop(lifeline);
    if let Ok(Some(FromClient::Stands)) = frame::read(&mut door, MAX_LIFELINE_BYTES) {
        let answer = match take_place(&view) {
            Ok(()) => FromStandIn::Ready,
            Err(error) => FromStandIn::Failed(error.to_string()),
        };
        // A client that is gone has killed nobody, and the sandbox stands.
        let _ = frame::write(&mut door, &answer, MAX_LIFELINE_BYTES);
    }
    drop(door);
    attend(monitor, signals)
}

/// Passes signals on until the monitor ends.
fn attend(mut monitor: Child, mut signals: Signals) -> Result<u8, StandInError> {
    let pidfd = process::pidfd(monitor.id()).map_err(host_io("watch the monitor"))?;
    while !signals.wait_beside(&pidfd) {
        while let Some(signal) = signals.take() {
            if let Some(signal) = Signal::from_named_raw(signal as i32) {
                // It may have ended meanwhile.
                let _ = rustix::process::pidfd_send_signal(&pidfd, signal);
            }
        }
    }
    let status = monitor.wait().map_err(host_io("wait for the monitor"))?;
    process::reap_orphans(Instant::now() + process::ORPHAN_TIME);
    Ok(exit::code_of_process(status))
}

/// Leaves the host's mounts for those of the view.
fn take_place(view: &View) -> Result<(), StandInError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(host("open /dev/null"))?;
    // SAFETY: this process has one thread, and no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(host("make a mount namespace"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(host("cut the mount namespace off"))?;
    let root = clone(&view.root, view.read_only).map_err(host("open the root file system"))?;
    let mounts: Vec<(&Shown, OwnedFd)> = view
        .mounts
        .iter()
        .map(|shown| Ok((shown, tree(shown)?)))
        .collect::<Result<_, _>>()
        .map_err(host("open a volume"))?;
    move_mount(&root, "", CWD, &view.root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .and_then(|()| rustix::process::chdir(&view.root))
        .and_then(|()| rustix::process::pivot_root(".", "."))
        .and_then(|()| unmount(".", UnmountFlags::DETACH))
        .and_then(|()| rustix::process::chdir("/"))
        .map_err(host("enter the root file system"))?;
    for (shown, tree) in &mounts {
        // What is at the place is the guest's affair, who may have put there what nothing can be mounted on.
        let _ = attach(tree, &shown.destination);
    }
    // The streams are the monitor's, and whoever reads them waits for the last who has them.
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .map_err(host("let go of the standard streams"))
}

fn tree(shown: &Shown) -> rustix::io::Result<OwnedFd> {
    match &shown.source {
        Some(source) => clone(source, shown.read_only),
        None => nothing(),
    }
}

/// A detached copy of a mount of the host.
fn clone(source: &Path, read_only: bool) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags)?;
    let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    restrict(&tree, read_only | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC)?;
    Ok(tree)
}

/// An empty directory that stays empty.
fn nothing() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Attaches a tree at a path below `/`, which belongs to the hostile side.
fn attach(tree: &OwnedFd, destination: &Path) -> rustix::io::Result<()> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let target = openat2(root, destination, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Sets attributes of a mount.
fn restrict(tree: &OwnedFd, attributes: u64) -> rustix::io::Result<()> {
    const EMPTY: &CStr = c"";
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path and the structure are valid and outlive the call, which only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => {
            Err(rustix::io::Errno::from_io_error(&io::Error::last_os_error())
                .unwrap_or(rustix::io::Errno::IO))
        }
    }
}
