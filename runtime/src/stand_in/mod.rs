//! The process that stands for a container on the host, in the eyes of an engine.
//!
//! An engine takes the process of `--pid-file` for one in the container. It kills it, waits for it, and enters
//! its mount namespace: Podman does so to copy files, and would write to the host's `/etc` if that process lived
//! among the host's mounts. So it lives among mounts of its own, which show the container's files as far as the
//! host has them (see [`crate::view`]). It is in the container's network namespace too, which engines look for by it,
//! enter and fill.
//!
//! It is this same binary, started by `sandbox create` with a hidden subcommand. It starts the monitor, passes
//! the signals that it gets on to it, and ends with its exit code. When it dies, the kernel kills the monitor.
//! Its line to its client is the door: a [`Place`] comes in before the monitor is started, [`FromClient::Stands`]
//! when the container stands and its mount points are there, and [`FromStandIn`] goes back.
//!
//! A container that joins a sandbox has one of another kind, see [`mod@member`].

mod member;

pub use member::{MEMBER, member};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use sandbox_protocol::frame::{self, FrameError};
use sandbox_vmm_api::ShareEntry;
use serde::{Deserialize, Serialize};

use crate::client::Signals;
use crate::descriptor::{self, Ties};
use crate::monitor::{self, MAX_LIFELINE_BYTES};
use crate::sandbox::{Ends, Plan};
use crate::view::{View, ViewError};
use crate::{exit, network, process};
use member::Join;

/// The name of the hidden subcommand.
pub const SUBCOMMAND: &str = "stand-in";

/// Where it finds the monitor's end of the lifeline, where it starts one, and its own of the door.
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
    /// The container's files could not become its own.
    #[error(transparent)]
    View(#[from] ViewError),
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

/// What there is to be of the container on the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Place {
    view: View,
    /// Where engines look for its network.
    network: network::Wanted,
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
        let mut stand_in = Self::spawn(SUBCOMMAND, &[(lifeline.as_fd(), LIFELINE_FD)], streams)?;
        let view = View::of(&plan.container, plan.shares());
        let place = Place { view, network: plan.container.network.clone() };
        frame::write(&mut stand_in.door, &place, MAX_LIFELINE_BYTES)?;
        Ok(stand_in)
    }

    /// Starts one that asks for a container in the sandbox whose request socket this is.
    pub fn join(
        socket: PathBuf,
        plan: &Plan,
        shares: &[ShareEntry],
        streams: Option<Ends>,
    ) -> Result<Self, StandInError> {
        let mut stand_in = Self::spawn(MEMBER, &[], streams)?;
        let container = plan.container.clone();
        let join = Join { view: View::of(&container, shares), socket, container, shares: shares.to_vec() };
        frame::write(&mut stand_in.door, &join, MAX_LIFELINE_BYTES)?;
        Ok(stand_in)
    }

    fn spawn(
        subcommand: &str,
        given: &[(BorrowedFd<'_>, RawFd)],
        streams: Option<Ends>,
    ) -> Result<Self, StandInError> {
        let (door, theirs) = UnixStream::pair().map_err(host_io("make the door"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(subcommand);
        if let Some(Ends { stdin, stdout, stderr }) = streams {
            command.stdin(stream(stdin)).stdout(stream(stdout)).stderr(stream(stderr));
        }
        let mut given = given.to_vec();
        given.push((theirs.as_fd(), DOOR_FD));
        descriptor::give(&mut command, &given, Ties::None).map_err(host_io("prepare a process"))?;
        let child = command.spawn().map_err(host_io("start a process"))?;
        Ok(Self { child, door })
    }

    /// Lets it take its place, now that the container stands. From then on it lives on by itself.
    pub fn release(&mut self) -> Result<(), StandInError> {
        frame::write(&mut self.door, &FromClient::Stands, MAX_LIFELINE_BYTES)?;
        self.ready()
    }

    /// Waits until it has taken its place.
    pub fn ready(&mut self) -> Result<(), StandInError> {
        match frame::read(&mut self.door, MAX_LIFELINE_BYTES)? {
            Some(FromStandIn::Ready) => Ok(()),
            Some(FromStandIn::Failed(why)) => Err(StandInError::Failed(why)),
            None => Err(StandInError::Gone),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The process.
    pub fn into_child(self) -> Child {
        self.child
    }

    /// Ends it, and with it the monitor, or the container of a pod.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    /// Waits for its end.
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
    let place: Place = frame::read(&mut door, MAX_LIFELINE_BYTES)?.ok_or(StandInError::Gone)?;
    let signals = Signals::block().map_err(host_io("receive signals"))?;
    process::become_subreaper().map_err(host_io("become the reaper of the monitor's processes"))?;
    let lifeline = UnixStream::from(lifeline);
    // A namespace that cannot be entered is for the monitor to say, which looks into it.
    let home = place.network.enter().unwrap_or_default();
    let monitor = monitor::start_for_engine(&lifeline, home).map_err(host_io("start the monitor"))?;
    drop(lifeline);
    if let Ok(Some(FromClient::Stands)) = frame::read(&mut door, MAX_LIFELINE_BYTES) {
        let answer = match take_place(&place.view) {
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
    view.enter()?;
    // The streams are the monitor's, and whoever reads them waits for the last who has them.
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .map_err(host("let go of the standard streams"))
}
