//! Cgroups that systemd makes: each is a scope, a unit of processes that somebody else has started.
//!
//! systemd is asked over D-Bus by busctl(1), which is there where systemd is: a library for D-Bus would take more
//! memory of every monitor than all the rest of it. What the interface means is in org.freedesktop.systemd1(5).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::POLL;
use crate::printable::printable;

/// There where systemd is the host's init, see sd_booted(3).
const BOOTED: &str = "/run/systemd/system";

/// The program that asks it.
const BUSCTL: &str = "busctl";

const SERVICE: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Where scopes go that name no slice, as with runc.
const DEFAULT_SLICE: &str = "system.slice";

/// The slice of all slices.
const ROOT_SLICE: &str = "-.slice";

/// How long systemd may take to move processes.
const MOVE_TIME: Duration = Duration::from_secs(30);

/// Why systemd has made no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// There is none.
    #[error("systemd does not run on this host, which has no {BOOTED}")]
    Absent,
    /// It could not be asked.
    #[error("systemd cannot be asked: {BUSCTL} cannot be started: {0}")]
    Busctl(std::io::Error),
    /// It said no.
    #[error("systemd refuses to {step}: {}", printable(.answer))]
    Refused {
        /// What was being done.
        step: &'static str,
        /// What it said.
        answer: String,
    },
    /// It did not do it.
    #[error("systemd has not moved the processes to the scope {unit} within {} s", MOVE_TIME.as_secs())]
    NotMoved {
        /// The scope.
        unit: String,
    },
}

/// A scope.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Scope {
    name: String,
    slice: String,
}

impl Scope {
    /// What `slice:prefix:name` means, the form that `linux.cgroupsPath` has with systemd.
    pub fn parse(path: &Path) -> Option<Self> {
        let mut parts = path.to_str()?.split(':');
        let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
        let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
        let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        let good = parts.next().is_none() && is_name(name) && is_name(&unit) && is_slice(slice);
        good.then(|| Self { name: unit, slice: slice.into() })
    }

    /// Where its cgroup is going to be, from the mount of each hierarchy.
    pub fn path(&self) -> Result<PathBuf, SystemdError> {
        if !Path::new(BOOTED).is_dir() {
            return Err(SystemdError::Absent);
        }
        // Below its own, where it runs in a container itself.
        let answer =
            busctl("say where its cgroups are", &["get-property", SERVICE, OBJECT, MANAGER, "ControlGroup"])?;
        let root =
            answer.trim().strip_prefix("s \"").and_then(|rest| rest.strip_suffix('"')).unwrap_or_default();
        Ok(Path::new(root.trim_matches('/')).join(self.below_slices()))
    }

    /// Its place below the slice of all slices.
    pub fn below_slices(&self) -> PathBuf {
        slice_path(&self.slice).join(&self.name)
    }

    /// Makes it, of these processes, and waits until they are in its cgroup.
    pub fn start(&self, path: &Path, processes: impl Iterator<Item = u32>) -> Result<(), SystemdError> {
        let pids: Vec<String> = processes.map(|pid| pid.to_string()).collect();
        let count = pids.len().to_string();
        let mut words = vec!["call", SERVICE, OBJECT, MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))"];
        words.extend([&self.name, "replace", "5", "Description", "s", "sandbox", "Slice", "s", &self.slice]);
        // Delegated: what is in it, and which controllers it has, is ours.
        words.extend(["Delegate", "b", "true", "DefaultDependencies", "b", "false", "PIDs", "au", &count]);
        words.extend(pids.iter().map(String::as_str));
        words.push("0");
        busctl("make a scope", &words)?;
        let deadline = Instant::now() + MOVE_TIME;
        while !pids.iter().all(|pid| is_inside(pid, path)) {
            if Instant::now() > deadline {
                return Err(SystemdError::NotMoved { unit: self.name.clone() });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Limits its memory.
    pub fn limit_memory(&self, bytes: u64) -> Result<(), SystemdError> {
        let bytes = bytes.to_string();
        let call =
            ["call", SERVICE, OBJECT, MANAGER, "SetUnitProperties", "sba(sv)", &self.name, "true", "1"];
        busctl("limit the memory of a scope", &[&call[..], &["MemoryMax", "t", &bytes]].concat()).map(drop)
    }

    /// Has systemd forget it. One that is empty has been forgotten already.
    pub fn stop(&self) {
        for words in [&["StopUnit", "ss", &self.name, "replace"][..], &["ResetFailedUnit", "s", &self.name]] {
            let _ = busctl("stop a scope", &[&["call", SERVICE, OBJECT, MANAGER], words].concat());
        }
    }
}

fn busctl(step: &'static str, words: &[&str]) -> Result<String, SystemdError> {
    let mut command = Command::new(BUSCTL);
    let output = command.args(words).stdin(Stdio::null()).output().map_err(SystemdError::Busctl)?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let answer = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(SystemdError::Refused { step, answer })
        }
    }
}

/// Whether systemd's own hierarchy has a process at a path. One that has ended does not matter.
fn is_inside(pid: &str, path: &Path) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return true };
    text.lines().any(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (hierarchy, place) = (parts.next(), parts.next().unwrap_or_default());
        matches!(hierarchy, Some("" | "name=systemd")) && Path::new(place.trim_start_matches('/')) == path
    })
}

/// What systemd takes for the name of a unit.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    (1..=255).contains(&name.len()) && name.chars().all(allowed)
}

fn is_slice(slice: &str) -> bool {
    let Some(name) = slice.strip_suffix(".slice") else { return false };
    let parts_are_good = || name.split('-').all(|part| !part.is_empty());
    slice == ROOT_SLICE || (is_name(slice) && parts_are_good())
}

/// `a-b.slice` is in `a.slice`, see systemd.slice(5).
fn slice_path(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
    match slice {
        ROOT_SLICE => PathBuf::new(),
        _ => ends.map(|end| format!("{}.slice", name.get(..end).unwrap_or_default())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(path: &str) -> Option<(String, String)> {
        Scope::parse(Path::new(path)).map(|scope| (scope.slice, scope.name))
    }

    #[test]
    fn a_path_for_systemd_has_three_parts() {
        let pair = |slice: &str, name: &str| Some((slice.to_owned(), name.to_owned()));
        assert_eq!(scope("machine.slice:libpod:x"), pair("machine.slice", "libpod-x.scope"));
        assert_eq!(scope(":docker:x"), pair("system.slice", "docker-x.scope"));
        assert_eq!(scope("a-b.slice::x"), pair("a-b.slice", "x.scope"));
        for bad in [
            "/a/b",
            "a.slice:x",
            "a:b:c",
            "a.slice:b:",
            "a.slice:b:c:d",
            "a.slice:b:c/d",
            "../a.slice:b:c",
            "a--b.slice:x:y",
        ] {
            assert_eq!(scope(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_slice_is_in_the_slices_that_its_name_has() {
        assert_eq!(slice_path("a-b-c.slice"), Path::new("a.slice/a-b.slice/a-b-c.slice"));
        assert_eq!(slice_path("system.slice"), Path::new("system.slice"));
        assert_eq!(slice_path("-.slice"), Path::new(""));
    }
}
