//! The cgroup of a container: one directory in that of the pod, in the guest's hierarchy, which is version 2
//! whatever the host has.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Linux;
use rustix::fs::{AtFlags, Mode, OFlags, chownat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::device_filter::{self, DeviceFilterError};
use super::limits::{self, LimitError, Offered, Setting};
use super::user_namespace::Owner;
use crate::boot::{CGROUP_MOUNT, POD_CGROUP};

/// Lists the files of a cgroup that go with it when it is given to somebody.
const DELEGATED_FILES: &str = "/sys/kernel/cgroup/delegate";

/// Where the kernel counts what a lack of memory has led to.
const MEMORY_EVENTS: &str = "memory.events";

/// The cgroup could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of it was refused.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was being done.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The configuration has a limit that means nothing.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A limit was refused.
    #[error("{field}: the guest's kernel refuses {value:?} in {file}: {source}")]
    Refused {
        /// Where in config.json it stands.
        field: String,
        /// The file of the cgroup.
        file: String,
        /// What was written.
        value: String,
        /// Why not.
        source: io::Error,
    },
    /// The kernel has no such limit.
    #[error("{field}: the guest's kernel has no {file}")]
    Missing {
        /// Where in config.json it stands.
        field: String,
        /// The file of the cgroup.
        file: String,
    },
    /// The device rules were refused.
    #[error(transparent)]
    Devices(#[from] DeviceFilterError),
}

/// The cgroup of a container.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    events: File,
    /// Where the kernel counts memory.
    memory_events: Option<File>,
}

impl Cgroup {
    /// Makes the cgroup of a container and sets its limits and device rules; `id` is a plain name.
    pub fn create(id: &str, linux: Option<&Linux>) -> Result<Self, CgroupError> {
        let path = Path::new(POD_CGROUP).join(id);
        std::fs::create_dir(&path).map_err(|e| file_error("make", &path, e))?;
        let made = Self::open(path.clone()).and_then(|cgroup| {
            cgroup.apply(linux)?;
            Ok(cgroup)
        });
        if made.is_err() {
            let _ = std::fs::remove_dir(&path);
        }
        made
    }

    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let directory = open_directory(&path)?;
        let events_path = path.join("cgroup.events");
        let events = File::open(&events_path).map_err(|e| file_error("open", &events_path, e))?;
        let memory_events = File::open(path.join(MEMORY_EVENTS)).ok();
        Ok(Self { path, directory, events, memory_events })
    }

    fn apply(&self, linux: Option<&Linux>) -> Result<(), CgroupError> {
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        for setting in
            resources.map(|r| limits::settings(r, &self.offered())).transpose()?.unwrap_or_default()
        {
            self.set(&setting)?;
        }
        let rules = resources.and_then(|r| r.devices().as_deref()).unwrap_or_default();
        Ok(device_filter::attach(self.directory.as_fd(), rules)?)
    }

    /// Sets one limit.
    pub(super) fn set(&self, setting: &Setting) -> Result<(), CgroupError> {
        let (field, file) = (setting.field.clone(), setting.file.clone());
        // Not to be made where it is missing: the kernel would answer that with a refusal.
        let opened = File::options().write(true).open(self.path.join(&file));
        match opened.and_then(|mut opened| opened.write_all(setting.value.as_bytes())) {
            // A kernel without swap has no limit of it, and none is needed.
            Err(e) if e.kind() == io::ErrorKind::NotFound && file == limits::SWAP_FILE => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(CgroupError::Missing { field, file }),
            written => written.map_err(|source| {
                let value = setting.value.clone();
                CgroupError::Refused { field, file, value, source }
            }),
        }
    }

    /// What the kernel offers to it.
    pub(super) fn offered(&self) -> Offered {
        Offered {
            controllers: self.read("cgroup.controllers").unwrap_or_default(),
            bfq: self.path.join(limits::BFQ_WEIGHT_FILE).exists(),
        }
    }

    /// The text of one of its files.
    pub(super) fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.path.join(file)).ok()
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its `cgroup.events`, which signals every change by an exceptional condition.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Its `memory.events`, which signals as `cgroup.events` does.
    pub fn memory_events(&self) -> Option<BorrowedFd<'_>> {
        self.memory_events.as_ref().map(AsFd::as_fd)
    }

    /// Whether a process is left in it or below it. Taken to be so where it cannot be read.
    pub fn is_populated(&self) -> bool {
        self.event("populated") != Some(0)
    }

    fn event(&self, key: &str) -> Option<u64> {
        number_in(&self.events, key)
    }

    /// Has every process in it and below it stand still, or go on; neither is waited for.
    pub fn hold(&self, held: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if held { "1" } else { "0" })
    }

    /// Whether its processes are told to stand still.
    pub fn is_held(&self) -> bool {
        self.read("cgroup.freeze").is_some_and(|text| text.trim() == "1")
    }

    /// Whether all of them do.
    pub fn is_frozen(&self) -> bool {
        self.event("frozen") == Some(1)
    }

    /// Kills every process in it and below it, those that stand still too.
    pub fn kill(&self) {
        // It can fail only where the cgroup is gone, and with it every process.
        let _ = std::fs::write(self.path.join("cgroup.kill"), "1");
    }

    /// Sends a signal to every process in it and below it.
    pub fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            self.kill();
            return Ok(());
        }
        // Frozen, so that none can fork away from the list.
        let paused = self.is_held();
        self.hold(true)?;
        self.await_frozen();
        let sent = self.signal_each(&self.path, signal);
        self.hold(paused)?;
        sent
    }

    /// Waits until every process is held; one that the kernel cannot hold now cannot fork now either.
    fn await_frozen(&self) {
        for _ in 0..BUSY_TRIES {
            if self.is_frozen() {
                return;
            }
            std::thread::sleep(BUSY_PAUSE);
        }
    }

    fn signal_each(&self, directory: &Path, signal: i32) -> Result<(), CgroupError> {
        let list = directory.join("cgroup.procs");
        let pids = std::fs::read_to_string(&list).map_err(|e| file_error("read", &list, e))?;
        for pid in pids.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
            // A process that has just ended needs no signal.
            if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
                let _ = super::signal(&pidfd, signal);
            }
        }
        for below in subdirectories(directory) {
            self.signal_each(&below, signal)?;
        }
        Ok(())
    }

    /// The directory into which one more process is born: that of the container's first process, which is the
    /// container's own until that process makes cgroups below it and moves. It moves before it gives them
    /// controllers (a cgroup whose children have them holds no process itself), as systemd does, and a process that
    /// came into the container's own in between would have the kernel refuse them.
    pub fn home_of(&self, init: Pid) -> Result<OwnedFd, CgroupError> {
        let list = PathBuf::from(format!("/proc/{}/cgroup", init.as_raw_nonzero()));
        let text = std::fs::read(&list).map_err(|e| file_error("read", &list, e))?;
        let place =
            text.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"0::/")).unwrap_or_default();
        let home = Path::new(CGROUP_MOUNT).join(OsStr::from_bytes(place));
        // One that has left the container's cgroup takes nobody with it.
        open_directory(if home.starts_with(&self.path) { &home } else { &self.path })
    }

    /// How many of its processes have been killed for lack of memory.
    pub fn oom_kills(&self) -> u64 {
        self.memory_events.as_ref().and_then(|events| number_in(events, "oom_kill")).unwrap_or(0)
    }

    /// What it has used, for the report of its end.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        [
            ("cpu_micros", self.read_number("cpu.stat", "usage_usec")),
            ("memory_peak_bytes", self.read_single("memory.peak")),
            ("pids_peak", self.read_single("pids.peak")),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
    }

    /// The memory in use, in bytes.
    pub fn memory_in_use(&self) -> Option<u64> {
        self.read_single("memory.current")
    }

    /// Lets a user make cgroups below it and move processes among them, with the files that the kernel names for
    /// this and no others: the limits stay the agent's.
    pub(super) fn give_to(&self, owner: Owner) -> Result<(), CgroupError> {
        let files = std::fs::read_to_string(DELEGATED_FILES)
            .map_err(|e| file_error("read", Path::new(DELEGATED_FILES), e))?;
        for name in files.lines().chain(["."]) {
            match chownat(&self.directory, name, Some(owner.uid), Some(owner.gid), AtFlags::SYMLINK_NOFOLLOW)
            {
                // Of a controller that this kernel does not have.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(file_error("change the owner of", &self.path.join(name), e.into())),
            }
        }
        Ok(())
    }

    /// Removes it and what the container has made below it; nothing runs in it any more.
    pub fn remove(self) -> Result<(), CgroupError> {
        remove_tree(&self.path)
    }

    fn read_number(&self, file: &str, key: &str) -> Option<u64> {
        number_of(&self.read(file)?, key)
    }

    fn read_single(&self, file: &str) -> Option<u64> {
        self.read(file)?.trim().parse().ok()
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        std::fs::write(&path, value).map_err(|e| file_error("write", &path, e))
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The number behind a key in an open flat-keyed file. What it signals from then on is what changes later.
fn number_in(file: &File, key: &str) -> Option<u64> {
    let mut text = [0; 256];
    let n = file.read_at(&mut text, 0).ok()?;
    number_of(&String::from_utf8_lossy(text.get(..n)?), key)
}

/// The number behind a key in a flat-keyed file.
fn number_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The cgroups right below one.
pub(super) fn subdirectories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// How often, and how long apart, a cgroup whose last process is still on its way out is tried again.
const BUSY_TRIES: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(1);

fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    for below in subdirectories(path) {
        remove_tree(&below)?;
    }
    for _ in 0..BUSY_TRIES {
        match std::fs::remove_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(BUSY_PAUSE),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            done => return done.map_err(|e| file_error("remove", path, e)),
        }
    }
    Err(file_error("remove", path, io::ErrorKind::ResourceBusy.into()))
}

fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| file_error("open", path, e.into()))
}

pub(super) fn file_error(action: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_its_whole_key() {
        let events = "low 0\noom 4\noom_kill 3\noom_group_kill 1\n";
        assert_eq!(number_of(events, "oom_kill"), Some(3));
        assert_eq!(number_of(events, "oom_"), None);
        assert_eq!(number_of("populated 0\nfrozen 0\n", "populated"), Some(0));
        assert_eq!(number_of("oom_kill many\n", "oom_kill"), None);
    }
}
