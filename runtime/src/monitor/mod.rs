//! The monitor: the process that owns a sandbox.
//!
//! It is this same binary, started by the client with a hidden subcommand. It inherits the client's standard
//! streams, so that the bytes of the guest's process are copied once, and one end of a socket pair, the lifeline.
//! Over the lifeline it gets its [`Plan`] and then requests, and tells how it goes; when the client's end closes,
//! the sandbox ends.
//!
//! The monitor of `sandbox create` is the child of the process that stands for the container in the eyes of an
//! engine ([`crate::stand_in`]): it outlives its client once the container stands, passes the signals that it gets
//! on to the process, and ends with that process's code.

mod lifeline;
mod signals;
mod socket;

pub use lifeline::{FromMonitor, MAX_LIFELINE_BYTES};
pub use socket::{Added, AskError, Asker, MemoryWatch, ask, claim, listener};

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};

use nix::sys::signal::{SigSet, Signal};
use sandbox_protocol::frame::{self, FrameError};
use sandbox_vmm_api::MachineKind;

use crate::descriptor::{self, Ties};
use crate::log::Log;
use crate::sandbox::{
    self, Claimed, ContainerPlan, Ending, Ends, Error, Home, Inbox, MachinePlan, Plan, Watcher,
};
use crate::stdio::{Saved, open_console};
use crate::timings::{Moment, Timeline};
use crate::{exit, process};

/// The name of the hidden subcommand.
pub const SUBCOMMAND: &str = "monitor";

/// Where the monitor finds its end of the lifeline.
const LIFELINE_FD: RawFd = 3;

/// Why a monitor could not even begin.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// It was not started by a client.
    #[error("this is for `sandbox run` to start: {0}")]
    NotOurs(io::Error),
    /// The client sent something else than a plan.
    #[error("the plan cannot be read: {0}")]
    Plan(#[from] FrameError),
    /// The plan is for a container of a pod, which has a monitor.
    #[error("the plan is for a container that joins a sandbox")]
    NoMachine,
    /// The client went away before it sent one.
    #[error("the client is gone")]
    ClientGone,
}

/// Starts a monitor. The caller keeps its end of the lifeline.
pub fn start(lifeline: &UnixStream) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND);
    descriptor::give(&mut command, &[(lifeline.as_fd(), LIFELINE_FD)], Ties::Job)?;
    command.spawn()
}

/// Starts the monitor of a container that this process, which has one thread, stands for; in this network namespace, if
/// not in ours.
pub fn start_for_engine(lifeline: &UnixStream, network: Option<OwnedFd>) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).arg(std::process::id().to_string());
    descriptor::give(&mut command, &[(lifeline.as_fd(), LIFELINE_FD)], Ties::Machine)?;
    if let Some(network) = network {
        descriptor::run_in(&mut command, network);
    }
    command.spawn()
}

/// What the hidden subcommand does. Returns the exit code, which is that of the sandbox.
pub fn main(stand_in: Option<&OsStr>) -> Result<u8, MonitorError> {
    let stand_in = stand_in.map(parent).transpose()?;
    let lifeline = descriptor::take(LIFELINE_FD).map_err(MonitorError::NotOurs)?;
    leave_signals_to_the_client();
    let terminal = Saved::now();
    let mut lifeline = UnixStream::from(lifeline);
    let mut plan: Plan = frame::read(&mut lifeline, MAX_LIFELINE_BYTES)?.ok_or(MonitorError::ClientGone)?;
    plan.container.stand_in = stand_in;
    let (detached, cgroup) = (plan.container.detached, plan.container.cgroup.clone());
    let mut timeline = Timeline::from(Moment::now());
    let Home::Own(machine) = plan.home else { return Err(MonitorError::NoMachine) };
    let silent = detached && !machine.debug;
    let mut client = Client { lifeline, is_there: true, stands: false, silent, resize: None };
    let ending = match prepare(plan.container, &machine, &mut client) {
        Ok((first, ends, inbox)) => sandbox::run(*machine, first, ends, &inbox, &mut client, &mut timeline),
        Err(error) => Ending::of(&error),
    };
    socket::finish();
    let code = exit::code_of(&ending);
    if let (Some(cgroup), false) = (cgroup, detached && client.stands) {
        // Nobody is going to delete what never stood, or was never to stay.
        cgroup.leave(stand_in.into_iter().chain([std::process::id()]));
    }
    client.tell(&FromMonitor::Ended { ending, timeline });
    if let (false, false, Some(terminal)) = (client.is_there, detached, terminal) {
        // Whoever was to restore it is gone.
        terminal.restore();
    }
    Ok(code)
}

/// The parent that stands for the container, which is still there: it takes us with it when it dies.
fn parent(pid: &OsStr) -> Result<u32, MonitorError> {
    let pid: Option<u32> = pid.to_str().and_then(|pid| pid.parse().ok());
    pid.filter(|pid| *pid == std::os::unix::process::parent_id()).ok_or(MonitorError::ClientGone)
}

fn prepare(
    plan: ContainerPlan,
    machine: &MachinePlan,
    client: &mut Client,
) -> Result<(Claimed, Ends, Inbox), Error> {
    let inbox = Inbox::new();
    let claimed = socket::claim(plan, inbox.sender())?;
    let plan = &claimed.plan;
    let host = |step| move |error| Error::Host { step, error };
    process::become_subreaper().map_err(host("become the reaper of the machine's processes"))?;
    if let Some(cgroup) = &plan.cgroup {
        cgroup.enter(plan.stand_in.into_iter().chain([std::process::id()]))?;
        cgroup.limit(machine.config.memory_mib.into())?;
    }
    let lifeline = client.lifeline.try_clone().map_err(host("copy the lifeline"))?;
    lifeline::listen(lifeline, claimed.serial, inbox.sender()).map_err(host("listen to the client"))?;
    let terminal = plan.console_socket.as_deref().map(open_console).transpose()?;
    let ends = match &terminal {
        Some(terminal) => Ends::terminal(terminal),
        None => Ends::inherited(),
    };
    if terminal.is_some() && !machine.debug {
        // The container has other ones, and whoever made it may wait for the end of these.
        descriptor::drop_standard_streams().map_err(host("let go of the standard streams"))?;
    }
    if plan.detached {
        client.resize =
            signals::pass_on(terminal, claimed.serial, inbox.sender()).map_err(host("receive signals"))?;
    }
    Ok((claimed, ends.map_err(host("copy the standard streams"))?, inbox))
}

/// We are in the client's job, and the terminal's signals go to all of it. The client passes them on, once.
fn leave_signals_to_the_client() {
    let mut signals = SigSet::empty();
    for signal in crate::client::FORWARDED.into_iter().chain([Signal::SIGTTOU, Signal::SIGWINCH]) {
        signals.add(signal);
    }
    let _ = signals.thread_block();
}

/// The client, as long as it is there.
struct Client {
    lifeline: UnixStream,
    is_there: bool,
    /// Whether the container has been made.
    stands: bool,
    /// Whether standard error is the container's alone once it stands: whoever made it may wait for its end.
    silent: bool,
    /// Passes the size of the terminal on, where that is ours to do.
    resize: Option<signals::Resize>,
}

impl Client {
    fn tell(&mut self, message: &FromMonitor) {
        self.is_there &= frame::write(&mut self.lifeline, message, MAX_LIFELINE_BYTES).is_ok();
    }
}

impl Watcher for Client {
    fn machine(&mut self, kind: MachineKind, reason: &str) {
        self.tell(&FromMonitor::Machine { kind, reason: reason.into() });
    }

    fn created(&mut self) {
        self.stands = true;
        if self.silent {
            let _ = descriptor::drop_standard_streams();
        }
        self.tell(&FromMonitor::Created);
    }

    fn warn(&mut self, message: &str) {
        Log::plain().info(message);
    }

    fn started(&mut self) {
        self.tell(&FromMonitor::Started);
        if let Some(resize) = &self.resize {
            // The engine may have set it before there was a process.
            resize.now();
        }
    }
}

/// The path of a sandbox's request socket, for the commands that ask.
pub fn socket_of(directory: &Path) -> std::path::PathBuf {
    crate::state::StateDirPaths(directory).monitor_socket()
}
