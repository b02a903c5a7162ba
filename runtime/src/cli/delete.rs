//! `sandbox delete`.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Error, Global};
use crate::log::Log;
use crate::sandbox::Request;
use crate::state::{Record, SandboxId, StateDir, StateError, Status, find, is_owned};
use crate::{cgroup, hooks, monitor, process};

/// How long a sandbox may take to end after its process was killed.
const END_TIME: Duration = Duration::from_secs(20);

/// How long a lock that somebody takes only to look may be in the way.
const LOOK_TIME: Duration = Duration::from_secs(2);

const POLL: Duration = Duration::from_millis(2);

/// The arguments of `sandbox delete`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// Kill it first if it runs; one that does not exist is no error
    #[arg(long, short)]
    force: bool,
}

/// Removes what is left of a sandbox.
pub fn delete(args: &Args, global: &Global) -> Result<u8, Error> {
    let root = global.root();
    if args.force {
        return by_force(&args.id, &root);
    }
    let (directory, record) = find(&root, &args.id)?;
    match record.status {
        Status::Stopped => {}
        // Nobody has seen it run.
        Status::Created => end(&directory, &record)?,
        status => {
            return Err(Error::Failed(format!(
                "cannot delete container {} that is not stopped: {}: kill it first, or give --force",
                args.id,
                status.name()
            )));
        }
    }
    remove(&directory, &record)?;
    Ok(0)
}

/// Removes a sandbox, whatever it is doing.
pub fn by_force(id: &SandboxId, root: &Path) -> Result<u8, Error> {
    match find(root, id) {
        Ok((directory, record)) => {
            if record.status != Status::Stopped {
                end(&directory, &record)?;
            }
            remove(&directory, &record)?;
        }
        Err(StateError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(0)
}

/// Kills the process of a sandbox and waits for the end of its monitor; a monitor that does not end is killed.
fn end(directory: &Path, record: &Record) -> Result<(), Error> {
    let kill = Request::Signal { signal: Signal::KILL.as_raw(), all: false };
    let monitor = process::pidfd(record.pid);
    let asked = monitor::ask(&monitor::socket_of(directory), &kill);
    let deadline = Instant::now() + if asked.is_ok() { END_TIME } else { Duration::ZERO };
    while is_owned(directory)? && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    // The descriptor was opened while the monitor held the directory.
    if let (true, Ok(monitor)) = (is_owned(directory)?, monitor) {
        let _ = rustix::process::pidfd_send_signal(&monitor, Signal::KILL);
        process::wait_for(&monitor, Instant::now() + END_TIME);
    }
    Ok(())
}

fn remove(directory: &Path, record: &Record) -> Result<(), Error> {
    let deadline = Instant::now() + LOOK_TIME;
    loop {
        if let Some(dead) = StateDir::stale(directory)? {
            dead.remove()?;
            break;
        }
        if !directory.exists() {
            break;
        }
        if Instant::now() > deadline {
            return Err(Error::Failed(format!("container {} is still running", record.id)));
        }
        std::thread::sleep(POLL);
    }
    if let Some(path) = &record.cgroup {
        cgroup::remove(path);
    }
    for failed in hooks::run_all("poststop", &record.poststop, record, Status::Stopped) {
        Log::plain().info(&failed.to_string());
    }
    Ok(())
}
