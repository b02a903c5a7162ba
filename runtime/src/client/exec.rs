//! One more process in a running container, and the process on the host that stands for it.
//!
//! Attached, that is the command itself. Detached, it is a child of it, started with a hidden subcommand as a
//! monitor is: it lives on, and ends with the exit code of the process that it stands for.

use std::io;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};

use nix::sys::signal::Signal;
use oci_spec::runtime::Process;
use sandbox_protocol::ExitStatus;
use sandbox_protocol::frame::{self, FrameError};
use serde::{Deserialize, Serialize};

use super::Signals;
use crate::descriptor::{self, Ties};
use crate::monitor::{Added, AskError, MAX_LIFELINE_BYTES};
use crate::sandbox::{Ends, Request};
use crate::stdio::{ConsoleError, RawTerminal, open_console, window_size};

/// The name of the hidden subcommand.
pub const HOLDER: &str = "exec-holder";

/// Where the holder finds the line to the command that started it.
const LINE_FD: RawFd = 3;

/// What is to be run, and how.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ExecPlan {
    /// The container's request socket.
    pub socket: PathBuf,
    /// The process.
    pub process: Process,
    /// Where the master of its terminal is sent.
    pub console_socket: Option<PathBuf>,
}

/// Why a process could not be added, or its end not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The sandbox.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The terminal for the engine.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Something on our side.
    #[error("cannot {step}: {error}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// The holder could not be talked to.
    #[error("cannot hand the process to its holder: {0}")]
    Line(#[from] FrameError),
    /// What the holder said.
    #[error("{0}")]
    Holder(String),
}

/// Runs a process and waits for its end. `started` is called once it runs.
pub fn attached(
    plan: &ExecPlan,
    started: impl FnOnce() -> Result<(), ExecError>,
) -> Result<ExitStatus, ExecError> {
    let host = |step| move |error| ExecError::Host { step, error };
    let mut signals = Signals::block().map_err(host("receive signals"))?;
    let has_terminal = plan.process.terminal().unwrap_or(false);
    let terminal = match (&plan.console_socket, has_terminal) {
        (Some(socket), true) => Some(open_console(socket)?),
        _ => None,
    };
    let ends = match &terminal {
        Some(terminal) => Ends::terminal(terminal),
        None => Ends::inherited(),
    };
    let ends = ends.map_err(host("copy the standard streams"))?;
    let mut added = Added::start(&plan.socket, &plan.process, ends)?;
    started()?;
    let raw = (has_terminal && terminal.is_none()).then(RawTerminal::enter).flatten();
    let size = || match &terminal {
        Some(terminal) => window_size(terminal),
        None => window_size(io::stdin()),
    };
    let resize = |added: &Added| {
        if let (true, Some((width, height))) = (has_terminal, size()) {
            added.ask(&Request::Resize { width, height });
        }
    };
    resize(&added);
    while !ended(&added, &signals) {
        while let Some(signal) = signals.take() {
            match (signal, &raw) {
                (Signal::SIGWINCH, _) => resize(&added),
                (Signal::SIGCONT, Some(raw)) => raw.apply(),
                (signal, _) => added.ask(&Request::Signal { signal: signal as i32, all: false }),
            }
        }
    }
    Ok(added.wait()?)
}

/// Waits for a signal or for the end of the process; whether it is the latter.
fn ended(added: &Added, signals: &Signals) -> bool {
    added.has_news() || signals.wait_beside(added)
}

/// What a holder tells the command that started it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum FromHolder {
    Started,
    Failed(String),
}

/// Runs a process and leaves it to a holder, which this returns.
pub fn detached(plan: &ExecPlan) -> Result<Child, ExecError> {
    let host = |step| move |error| ExecError::Host { step, error };
    let (mut line, theirs) = UnixStream::pair().map_err(host("make the line to the holder"))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(HOLDER);
    descriptor::give(&mut command, &[(theirs.as_fd(), LINE_FD)], Ties::None)
        .map_err(host("prepare the holder"))?;
    let mut holder = command.spawn().map_err(host("start the holder"))?;
    drop((theirs, command));
    frame::write(&mut line, plan, MAX_LIFELINE_BYTES)?;
    let failed = match frame::read(&mut line, MAX_LIFELINE_BYTES)? {
        Some(FromHolder::Started) => return Ok(holder),
        Some(FromHolder::Failed(why)) => why,
        None => "the process that was to hold it died".into(),
    };
    let _ = holder.wait();
    Err(ExecError::Holder(failed))
}

/// What the hidden subcommand does. Returns the exit code of the process.
pub fn holder() -> Result<u8, ExecError> {
    let host = |step| move |error| ExecError::Host { step, error };
    let line = descriptor::take(LINE_FD).map_err(host("find the command that started this"))?;
    let mut line = UnixStream::from(line);
    let Some(plan) = frame::read::<ExecPlan>(&mut line, MAX_LIFELINE_BYTES)? else {
        return Err(ExecError::Holder("the command that started this is gone".into()));
    };
    let mut teller = Some(line);
    let mut tell = |what: &FromHolder| {
        // It may be gone; the process runs all the same.
        teller.take().is_some_and(|mut line| frame::write(&mut line, what, MAX_LIFELINE_BYTES).is_ok())
    };
    let ended = attached(&plan, || {
        if plan.console_socket.is_some() {
            // The process has other ones, and whoever asked for it may wait for the end of these.
            descriptor::drop_standard_streams().map_err(host("let go of the standard streams"))?;
        }
        tell(&FromHolder::Started);
        Ok(())
    });
    match ended {
        Ok(status) => Ok(status.shell_code()),
        Err(error) => {
            tell(&FromHolder::Failed(error.to_string()));
            Err(error)
        }
    }
}
