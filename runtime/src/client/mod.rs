//! The client: the process that the user started and waits for.
//!
//! It starts the monitor and then does three things: it passes signals and window sizes on, holds the terminal
//! in raw mode while the process runs, and cleans up should the monitor be killed. The bytes of the process's
//! streams do not pass through it.

mod exec;
mod signals;

pub use exec::{ExecError, ExecPlan, HOLDER, attached, detached, holder};
pub use signals::{FORWARDED, Signals};

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use sandbox_protocol::frame::{self, FrameError};
use sandbox_vmm_api::MachineKind;

use crate::metrics::Attempt;
use crate::monitor::{self, FromMonitor, MAX_LIFELINE_BYTES};
use crate::process;
use crate::sandbox::{Ending, Ends, Failure, Home, Plan, PodPlan, Request};
use crate::stand_in::{StandIn, StandInError};
use crate::state::{StateDir, is_owned, read_record, remove_dead, remove_if_dead};
use crate::stdio::{RawTerminal, window_size};
use crate::timings::Timeline;

const POLL: Duration = Duration::from_millis(2);

/// Why there is no ending to tell.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Something on our side.
    #[error("cannot {step}: {error}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// The plan could not be handed over.
    #[error("cannot hand the plan to the monitor: {0}")]
    Plan(FrameError),
    /// The process that stands for the container.
    #[error(transparent)]
    StandIn(#[from] StandInError),
    /// The monitor ended without a word.
    #[error("the sandbox's monitor died ({0}); what it left has been cleaned up")]
    MonitorDied(ExitStatus),
}

/// Runs a sandbox in the foreground. `on_machine` is told which machine it got, and why.
pub fn run(
    plan: &Plan,
    on_machine: &mut dyn FnMut(MachineKind, &str),
) -> Result<(Ending, Timeline), ClientError> {
    let host = |step| move |error| ClientError::Host { step, error };
    let signals = Signals::block().map_err(host("receive signals"))?;
    process::become_subreaper().map_err(host("become the reaper of the monitor's processes"))?;
    let (mut lifeline, theirs) = UnixStream::pair().map_err(host("make the monitor's lifeline"))?;
    let monitor = monitor::start(&theirs).map_err(host("start the monitor"))?;
    drop(theirs);
    let attempt = Attempt::begin(plan.starts.as_deref());
    let mut watch = Watch { plan, signals, terminal: None, on_machine, attempt, ended: None };
    // From here on the monitor is waited for, whatever happens: closing the lifeline ends it.
    let told = frame::write(&mut lifeline, plan, MAX_LIFELINE_BYTES).map_err(ClientError::Plan);
    let watched = told.and_then(|()| watch.until_the_end(&mut lifeline));
    drop(lifeline);
    let ended = watch.ended.take();
    // The terminal goes back before anything is printed.
    drop(watch);
    let status = wait(monitor)?;
    process::reap_orphans(Instant::now() + process::ORPHAN_TIME);
    clean_up_after(plan);
    match (ended, watched) {
        (Some(ended), _) => Ok(ended),
        (None, Err(error @ ClientError::Host { .. })) => Err(error),
        (None, _) => Err(ClientError::MonitorDied(status)),
    }
}

/// Makes a container whose process waits to be started, and leaves it to the monitor of its sandbox, which is made for
/// it unless it joins one. Its process has these streams; none: ours.
///
/// The caller may have other children, which are none of this function's business.
pub fn create(
    plan: &Plan,
    streams: Option<Ends>,
    on_machine: &mut dyn FnMut(MachineKind, &str),
) -> Result<Created, ClientError> {
    match &plan.home {
        Home::Own(_) => make(plan, streams, on_machine),
        Home::Pod(pod) => join(plan, pod, streams),
    }
}

/// Has a container join the sandbox of a pod.
fn join(plan: &Plan, pod: &PodPlan, streams: Option<Ends>) -> Result<Created, ClientError> {
    let socket = monitor::socket_of(&plan.container.root.join(pod.sandbox.as_str()));
    let mut stand_in = StandIn::join(socket, plan, &pod.shares, streams)?;
    let Err(error) = stand_in.ready() else {
        return Ok(Created::Stands { stand_in: stand_in.into_child() });
    };
    let pid = stand_in.id();
    stand_in.kill();
    stand_in.wait().map_err(|error| ClientError::Host { step: "wait for what was to stand", error })?;
    wait_for_monitor(plan, pid);
    clean_up_after(plan);
    match error {
        StandInError::Failed(message) => {
            Ok(Created::Failed(Ending::Failed { failure: Failure::Other, message }))
        }
        error => Err(error.into()),
    }
}

/// Makes a container with a sandbox of its own.
fn make(
    plan: &Plan,
    streams: Option<Ends>,
    on_machine: &mut dyn FnMut(MachineKind, &str),
) -> Result<Created, ClientError> {
    let host = |step| move |error| ClientError::Host { step, error };
    let mut attempt = Attempt::begin(plan.starts.as_deref());
    let (mut lifeline, theirs) = UnixStream::pair().map_err(host("make the monitor's lifeline"))?;
    let mut stand_in = StandIn::start(&theirs, plan, streams)?;
    drop(theirs);
    let mut told = frame::write(&mut lifeline, plan, MAX_LIFELINE_BYTES).map_err(ClientError::Plan);
    let mut ended = None;
    while told.is_ok() {
        match frame::read(&mut lifeline, MAX_LIFELINE_BYTES) {
            Ok(Some(FromMonitor::Machine { kind, reason })) => {
                attempt.on(kind);
                on_machine(kind, &reason);
            }
            Ok(Some(FromMonitor::Created)) => match stand_in.release() {
                Ok(()) => {
                    attempt.stands();
                    return Ok(Created::Stands { stand_in: stand_in.into_child() });
                }
                Err(error) => {
                    stand_in.kill();
                    told = Err(error.into());
                }
            },
            Ok(Some(FromMonitor::Started)) => {}
            Ok(Some(FromMonitor::Ended { ending, .. })) => ended = Some(ending),
            Ok(None) | Err(_) => break,
        }
    }
    drop(lifeline);
    let pid = stand_in.id();
    let status = stand_in.wait().map_err(host("wait for the monitor"))?;
    wait_for_monitor(plan, pid);
    if told.is_ok() && ended.is_none() {
        disown(plan, pid);
    }
    clean_up_after(plan);
    match (ended, told) {
        (Some(ending), _) => Ok(Created::Failed(ending)),
        (None, Err(error)) => Err(error),
        (None, Ok(())) => Err(ClientError::MonitorDied(status)),
    }
}

/// What became of a sandbox that was to be created.
#[derive(Debug)]
pub enum Created {
    /// It stands.
    Stands {
        /// What stands for it.
        stand_in: Child,
    },
    /// It does not, and nothing is left of it.
    Failed(Ending),
}

/// Removes the record of a container whose monitor was killed when it stood and nobody had heard so: whoever asked for it
/// is told that nothing is left, and will not delete it.
fn disown(plan: &Plan, stand_in: u32) {
    let directory = plan.container.directory();
    let Ok(Some(dead)) = StateDir::stale(&directory) else { return };
    match read_record(&directory) {
        Ok(Some(record)) if record.pid == stand_in => {
            let _ = remove_dead(dead, Some(&record));
        }
        _ => dead.leave(),
    }
}

/// Removes what a monitor that was killed has left; one that ended by itself has left nothing.
fn clean_up_after(plan: &Plan) {
    let _ = remove_if_dead(&plan.container.directory());
    // Nobody else has the id, unless that is what went wrong.
    if let (Some(cgroup), false) = (&plan.container.cgroup, plan.container.directory().exists()) {
        cgroup.remove();
    }
}

/// Waits for a monitor that lets go of a container, what stood for it having ended: it holds the directory to the end.
/// Another container of the same name is not waited for.
fn wait_for_monitor(plan: &Plan, stand_in: u32) {
    let directory = plan.container.directory();
    let deadline = Instant::now() + process::ORPHAN_TIME;
    let is_ours = || match read_record(&directory) {
        Ok(Some(record)) => record.pid == stand_in,
        Ok(None) | Err(_) => true,
    };
    while is_owned(&directory).unwrap_or(false) && is_ours() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
}

fn wait(mut monitor: Child) -> Result<ExitStatus, ClientError> {
    monitor.wait().map_err(|error| ClientError::Host { step: "wait for the monitor", error })
}

struct Watch<'a> {
    plan: &'a Plan,
    signals: Signals,
    terminal: Option<RawTerminal>,
    on_machine: &'a mut dyn FnMut(MachineKind, &str),
    attempt: Attempt,
    ended: Option<(Ending, Timeline)>,
}

impl Watch<'_> {
    /// Until the monitor closes the lifeline.
    fn until_the_end(&mut self, lifeline: &mut UnixStream) -> Result<(), ClientError> {
        loop {
            let (signal, message) = {
                let sources = [self.signals.as_fd(), lifeline.as_fd()];
                let mut ready = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
                match rustix::event::poll(&mut ready, None) {
                    Ok(_) => {}
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(error) => {
                        return Err(ClientError::Host { step: "wait for the monitor", error: error.into() });
                    }
                }
                let [signal, message] = ready.map(|source| !source.revents().is_empty());
                (signal, message)
            };
            if signal {
                self.pass_signals_on(lifeline);
            }
            if message {
                match frame::read(lifeline, MAX_LIFELINE_BYTES) {
                    Ok(Some(message)) => self.heard(message, lifeline),
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
        }
    }

    fn heard(&mut self, message: FromMonitor, lifeline: &mut UnixStream) {
        match message {
            FromMonitor::Machine { kind, reason } => {
                self.attempt.on(kind);
                (self.on_machine)(kind, &reason);
            }
            FromMonitor::Created => self.attempt.stands(),
            FromMonitor::Started => {
                if self.has_terminal() {
                    self.terminal = RawTerminal::enter();
                    // The window may have changed since the plan was made.
                    self.pass_size_on(lifeline);
                }
            }
            FromMonitor::Ended { ending, timeline } => self.ended = Some((ending, timeline)),
        }
    }

    fn pass_signals_on(&mut self, lifeline: &mut UnixStream) {
        while let Some(signal) = self.signals.take() {
            if let (Signal::SIGCONT, Some(terminal)) = (signal, &self.terminal) {
                // The shell had the terminal while we were stopped.
                terminal.apply();
                self.pass_size_on(lifeline);
            }
            match signal {
                Signal::SIGWINCH => self.pass_size_on(lifeline),
                Signal::SIGINT => pass_on(Request::Interrupt, lifeline),
                signal => pass_on(Request::Signal { signal: signal as i32, all: false }, lifeline),
            }
        }
    }

    fn pass_size_on(&self, lifeline: &mut UnixStream) {
        if let (true, Some((width, height))) = (self.has_terminal(), window_size(io::stdin())) {
            pass_on(Request::Resize { width, height }, lifeline);
        }
    }

    fn has_terminal(&self) -> bool {
        self.plan.container.has_terminal()
    }
}

/// A monitor that is gone is noticed where its messages are read.
fn pass_on(request: Request, lifeline: &mut UnixStream) {
    let _ = frame::write(lifeline, &request, MAX_LIFELINE_BYTES);
}
