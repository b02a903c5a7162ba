//! The end of a sandbox: what is left of it is removed.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Error;
use crate::sandbox::Request;
use crate::state::{
    Record, SandboxId, StateDir, StateDirPaths, StateError, Status, directories, find, is_owned, owner,
    read_record,
};
use crate::{hooks, monitor, process};

/// How long a sandbox may take to end after its process was killed, or has ended.
const END_TIME: Duration = Duration::from_secs(20);

/// How long a container may take from its directory to its record.
const YOUTH: Duration = Duration::from_secs(1);

const POLL: Duration = Duration::from_millis(2);

/// Removes what is left of a sandbox that has stopped, or that nobody has seen run. Returns what is to be said
/// besides: hooks and other clean-up that failed.
pub fn delete(id: &SandboxId, root: &Path) -> Result<Vec<String>, Error> {
    let (directory, record) = find(root, id)?;
    match record.status {
        Status::Stopped => {}
        Status::Created => end(&directory, Some(&record))?,
        status => {
            return Err(Error::Failed(format!(
                "cannot delete container {id} that is not stopped: {}: kill it first, or give --force",
                status.name()
            )));
        }
    }
    remove(id, &directory, Some(&record))
}

/// Removes a sandbox, whatever it is doing. Returns what is to be said besides: that its record was of no help, and
/// what of the clean-up failed.
pub fn delete_by_force(id: &SandboxId, root: &Path) -> Result<Vec<String>, Error> {
    let directory = root.join(id.as_str());
    // Where a start was cut off, the record goes with the first look.
    let cut_off = read_record(&directory).ok().flatten();
    let (record, damage) = match find(root, id) {
        Ok((_, record)) => (Some(record), None),
        // Its monitor is there, and somebody has removed the record.
        Err(StateError::NotFound { .. }) if is_owned(&directory)? => (
            None,
            Some(format!("the state file of container {id} is missing: it was removed without its help")),
        ),
        Err(StateError::NotFound { .. }) => {
            if let Some(cgroup) = cut_off.and_then(|record| record.cgroup) {
                cgroup.remove();
            }
            return Ok(Vec::new());
        }
        Err(StateError::Damaged { path, error } | StateError::Read { path, error }) => {
            let what = format!("the state file {} is damaged: {error}", path.display());
            (None, Some(format!("{what}: container {id} was removed without its help")))
        }
        Err(error) => return Err(error.into()),
    };
    if record.as_ref().is_none_or(|record| record.status != Status::Stopped) {
        end(&directory, record.as_ref())?;
    }
    // A monitor that ends by itself has written a sound record, whatever stood there before.
    let record = record.or_else(|| read_record(&directory).ok().flatten());
    let mut said = remove(id, &directory, record.as_ref())?;
    said.extend(damage.map(|damage| match &record {
        Some(_) => damage,
        None => format!("{damage}: a cgroup that it had on the host may be left, and no hook was run"),
    }));
    Ok(said)
}

/// Kills the process of a container and waits until its monitor has let go of it. A monitor that does not end is killed,
/// unless it has a whole pod to look after, of which this is one container.
fn end(directory: &Path, record: Option<&Record>) -> Result<(), Error> {
    let kill = Request::Signal { signal: Signal::KILL.as_raw(), all: false };
    let socket = monitor::socket_of(directory);
    // By the kernel's word: a record may be wrong.
    let monitor = monitor::listener(&socket).or_else(|_| owner(directory));
    let joined = match (record, &monitor) {
        (Some(record), _) => record.sandbox.is_some(),
        (None, Ok(monitor)) => has_another(*monitor, directory)?,
        (None, Err(_)) => false,
    };
    let monitor = monitor.and_then(process::pidfd);
    let asked = monitor::ask(&socket, &kill);
    let deadline = Instant::now() + if joined || asked.is_ok() { END_TIME } else { YOUTH };
    while is_owned(directory)? && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    // The descriptor was opened while the monitor held the directory.
    if let (true, false, Ok(monitor)) = (is_owned(directory)?, joined, monitor) {
        let _ = rustix::process::pidfd_send_signal(&monitor, Signal::KILL);
        process::wait_for(&monitor, Instant::now() + END_TIME);
    }
    Ok(())
}

/// Whether a monitor leads a sandbox that another container came with, so that this one has joined it.
fn has_another(monitor: u32, directory: &Path) -> Result<bool, Error> {
    let Some(root) = directory.parent() else { return Ok(false) };
    let leads = |other: &Path| other != directory && StateDirPaths(other).vsock_directory().is_dir();
    let others = directories(root)?;
    Ok(others.iter().any(|other| leads(other) && owner(other).is_ok_and(|pid| pid == monitor)))
}

fn remove(id: &SandboxId, directory: &Path, record: Option<&Record>) -> Result<Vec<String>, Error> {
    let deadline = Instant::now() + END_TIME;
    loop {
        if let Some(dead) = StateDir::stale(directory)? {
            dead.remove()?;
            break;
        }
        if !directory.exists() {
            break;
        }
        // Its monitor may be on its way out, or somebody may have locked it to look.
        let owned = is_owned(directory)?;
        if Instant::now() > deadline {
            return Err(match owned {
                true => Error::Failed(format!("container {id} is still running")),
                false => StateError::Foreign { path: directory.into() }.into(),
            });
        }
        std::thread::sleep(POLL);
    }
    let Some(record) = record else { return Ok(Vec::new()) };
    if let Some(cgroup) = &record.cgroup {
        cgroup.remove();
    }
    let mut said: Vec<String> = record.network.clean_up(id).err().iter().map(ToString::to_string).collect();
    let failed = hooks::run_all("poststop", &record.poststop, record, Status::Stopped);
    said.extend(failed.iter().map(ToString::to_string));
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_that_leads_another_sandbox_is_known_without_a_record() {
        let root = tempfile::tempdir().unwrap();
        let claim = |id: &str| StateDir::claim(root.path(), &id.parse().unwrap()).unwrap();
        let (first, joined) = (claim("first"), claim("joined"));
        std::fs::create_dir(first.paths().vsock_directory()).unwrap();
        let path = |id: &str| root.path().join(id);
        assert!(has_another(std::process::id(), &path("joined")).unwrap());
        assert!(!has_another(std::process::id(), &path("first")).unwrap());
        assert!(!has_another(1, &path("joined")).unwrap());
        std::fs::remove_dir(first.paths().vsock_directory()).unwrap();
        drop((first, joined));
    }
}
