//! All sandboxes under one state root.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::directory::is_owned;
use super::{Record, SandboxId, StateDir, StateDirPaths, StateError, Status};

/// The most bytes of a record that are read: one that grew past it was not written by us.
const MAX_RECORD_BYTES: u64 = 8 << 20;

/// Where state goes unless `--root` says otherwise: `/run/sandbox` for root, else the user's runtime
/// directory.
pub fn default_root() -> PathBuf {
    match (rustix::process::geteuid().is_root(), std::env::var_os("XDG_RUNTIME_DIR")) {
        (false, Some(runtime)) if Path::new(&runtime).is_absolute() => PathBuf::from(runtime).join("sandbox"),
        _ => PathBuf::from("/run/sandbox"),
    }
}

/// Removes the directories of sandboxes whose monitor was killed.
pub fn sweep(root: &Path) -> Result<(), StateError> {
    directories(root)?.iter().try_for_each(|path| remove_if_dead(path))
}

/// Removes the directory of a sandbox, if its monitor was killed and nobody has to delete it.
pub fn remove_if_dead(directory: &Path) -> Result<(), StateError> {
    match StateDir::stale(directory)? {
        Some(dead) if dead.record_is_kept() => {
            dead.leave();
            Ok(())
        }
        Some(dead) => remove_dead(dead, read_record(directory).ok().flatten().as_ref()),
        None => Ok(()),
    }
}

/// Removes the directory of a sandbox whose monitor is dead, and what its record says that it had besides.
pub fn remove_dead(dead: StateDir, record: Option<&Record>) -> Result<(), StateError> {
    if let Some(record) = record {
        // It can be looked at, or it is gone.
        let _ = record.network.clean_up(&record.id);
    }
    dead.remove()
}

/// The records of the sandboxes, in the order of their ids. Sweeps first.
///
/// A sandbox that is so young that it has no record yet is left out, and one whose record cannot be read gives an
/// error of its own beside the others.
pub fn list(root: &Path) -> Result<(Vec<Record>, Vec<StateError>), StateError> {
    sweep(root)?;
    let (mut records, mut errors) = (Vec::new(), Vec::new());
    for path in directories(root)? {
        match observe(&path) {
            Ok(record) => records.extend(record),
            Err(error) => errors.push(error),
        }
    }
    records.sort_by(|a, b| a.id.cmp(&b.id));
    Ok((records, errors))
}

/// A sandbox's directory and its record, as things stand.
pub fn find(root: &Path, id: &SandboxId) -> Result<(PathBuf, Record), StateError> {
    let path = root.join(id.as_str());
    if path.is_dir() {
        remove_if_dead(&path)?;
    }
    match path.is_dir().then(|| observe(&path)).transpose()?.flatten() {
        Some(record) => Ok((path, record)),
        None => Err(StateError::NotFound { id: id.clone() }),
    }
}

/// A record, corrected: a sandbox whose owner is gone has stopped, whatever it wrote last.
fn observe(directory: &Path) -> Result<Option<Record>, StateError> {
    let Some(mut record) = read_record(directory)? else { return Ok(None) };
    if !is_owned(directory)? {
        record.status = Status::Stopped;
        record.pid = 0;
        record.machine_pid = None;
    }
    Ok(Some(record))
}

/// The directories of the sandboxes.
pub fn directories(root: &Path) -> Result<Vec<PathBuf>, StateError> {
    let error = |error| StateError::Read { path: root.into(), error };
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(error)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(error)?;
        // Anything else in the root was not put there by us, and is not ours to judge or remove.
        let named_as_ours = entry.file_name().to_str().is_some_and(|name| name.parse::<SandboxId>().is_ok());
        if named_as_ours && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The record in a directory.
pub fn read_record(directory: &Path) -> Result<Option<Record>, StateError> {
    let path = StateDirPaths(directory).record();
    let error = |error| StateError::Read { path: path.clone(), error };
    // Whatever somebody has put there must not be waited for.
    let file = match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(error)?,
    };
    let damaged = |error| StateError::Damaged { path: path.clone(), error };
    if !file.metadata().map_err(error)?.is_file() {
        return Err(damaged(io::Error::other("it is not a file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_RECORD_BYTES).read_to_end(&mut bytes).map_err(error)?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|e| damaged(e.into()))?;
    match directory.file_name().is_some_and(|name| name == record.id.as_str()) {
        true => Ok(Some(record)),
        false => Err(damaged(io::Error::other(format!("it is that of `{}`", record.id)))),
    }
}
