//! `sandbox check --security ID`: what holds the processes of a running sandbox's machine, as `/proc` shows it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caps::CapSet;
use serde::Serialize;

use super::Error;
use super::check::CheckError;
use crate::process::family;
use crate::state::{self, SandboxId, Status};

/// The kinds of namespaces, by their names in `/proc/PID/ns`.
const NAMESPACES: [&str; 6] = ["mnt", "net", "ipc", "uts", "pid", "user"];

/// What is in force.
#[derive(Debug, Serialize)]
pub struct Report {
    id: SandboxId,
    processes: Vec<Process>,
}

/// A process of the machine: `sandbox-vmm`, or QEMU.
#[derive(Debug, Serialize)]
struct Process {
    pid: u32,
    program: String,
    /// Whether it has a root directory of its own.
    own_root: bool,
    /// Of each kind of namespace, whether it is not the host's.
    own_namespaces: BTreeMap<&'static str, bool>,
    descriptors: usize,
    /// How many there may be; none: as many as the host has room for.
    most_descriptors: Option<u64>,
    /// Whether a crash would leave its memory in a file.
    core_dumps: bool,
    /// Where it is counted and bounded, as `controllers:path` (`0::path` in version 2).
    cgroups: Vec<String>,
    threads: Vec<Thread>,
}

#[derive(Debug, Serialize)]
struct Thread {
    tid: u32,
    name: String,
    uid: u32,
    no_new_privileges: bool,
    system_call_filter: bool,
    /// Those that it has or can have: what is permitted and not in effect is one system call away.
    capabilities: Vec<String>,
}

/// Looks at a running sandbox.
pub fn look(id: &SandboxId, root: &Path) -> Result<Report, Error> {
    let (_, record) = state::find(root, id)?;
    let Some(machine) = record.machine_pid.filter(|_| record.status != Status::Stopped) else {
        return Err(CheckError::NotRunning { id: id.clone() }.into());
    };
    let processes = family(machine)
        .into_iter()
        .map(Process::read)
        .collect::<io::Result<_>>()
        .map_err(|why| CheckError::Look { id: id.clone(), why })?;
    Ok(Report { id: id.clone(), processes })
}

/// The report as text: a line for each process, and one for each of its threads.
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    for process in &report.processes {
        let own = |own: &bool| if *own { "own" } else { "host's" };
        let namespaces: Vec<String> =
            process.own_namespaces.iter().map(|(kind, it)| format!("{kind} {}", own(it))).collect();
        text += &format!(
            "{} (process {}): root directory {}, {} of {} descriptors, {}core dumps\n  namespaces: {}\n  cgroups: {}\n",
            process.program,
            process.pid,
            own(&process.own_root),
            process.descriptors,
            process.most_descriptors.map_or("any number of".to_owned(), |most| most.to_string()),
            if process.core_dumps { "" } else { "no " },
            namespaces.join(", "),
            process.cgroups.join(", "),
        );
        for thread in &process.threads {
            let yes = |yes: bool, what: &str| if yes { what.to_owned() } else { format!("NO {what}") };
            let capabilities = match thread.capabilities.as_slice() {
                [] => "no capabilities".to_owned(),
                some => some.join(" "),
            };
            text += &format!(
                "  {:16} uid {}, {}, {}, {capabilities}\n",
                thread.name,
                thread.uid,
                yes(thread.system_call_filter, "system-call filter"),
                yes(thread.no_new_privileges, "no_new_privs"),
            );
        }
    }
    text
}

impl Process {
    fn read(pid: u32) -> io::Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let namespace = |of: &Path, kind| fs::read_link(of.join("ns").join(kind));
        let own = |kind| Ok((kind, namespace(&proc, kind)? != namespace(Path::new("/proc/self"), kind)?));
        let root = |of: &Path| fs::metadata(of.join("root")).map(|data| identity(&data));
        let limits = fs::read_to_string(proc.join("limits"))?;
        Ok(Self {
            pid,
            program: trimmed(&proc.join("comm"))?,
            own_root: root(&proc)? != root(Path::new("/proc/self"))?,
            own_namespaces: NAMESPACES.into_iter().map(own).collect::<io::Result<_>>()?,
            descriptors: fs::read_dir(proc.join("fd"))?.count(),
            most_descriptors: limit(&limits, "Max open files"),
            core_dumps: limit(&limits, "Max core file size") != Some(0),
            cgroups: cgroups(&fs::read_to_string(proc.join("cgroup"))?),
            threads: numbers(&proc.join("task"))?
                .into_iter()
                .map(|tid| Thread::read(&proc, tid))
                .collect::<io::Result<_>>()?,
        })
    }
}

/// A limit that is in force, from the text of `/proc/PID/limits`; none: there is none.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let values = limits.lines().find_map(|line| line.strip_prefix(name))?;
    values.split_whitespace().next()?.parse().ok()
}

/// The cgroups of the text of `/proc/PID/cgroup`, but for the root of a hierarchy, which bounds nothing.
fn cgroups(lines: &str) -> Vec<String> {
    let named = lines.lines().filter_map(|line| line.split_once(':'));
    named
        .filter(|(_, cgroup)| !cgroup.ends_with(":/"))
        .map(|(number, cgroup)| if number == "0" { format!("0:{cgroup}") } else { cgroup.to_owned() })
        .collect()
}

fn identity(data: &fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt as _;
    (data.dev(), data.ino())
}

impl Thread {
    fn read(proc: &Path, tid: u32) -> io::Result<Self> {
        let task = proc.join("task").join(tid.to_string());
        let status = fs::read_to_string(task.join("status"))?;
        let number =
            |field| first_number(&status, field).ok_or_else(|| io::Error::other(format!("no {field}")));
        let held = caps::read(i32::try_from(tid).ok(), CapSet::Permitted).map_err(io::Error::other)?;
        let mut capabilities: Vec<String> = held.iter().map(ToString::to_string).collect();
        capabilities.sort();
        Ok(Self {
            tid,
            name: trimmed(&task.join("comm"))?,
            uid: number("Uid")?,
            no_new_privileges: number("NoNewPrivs")? == 1,
            // 2 is a filter (`SECCOMP_MODE_FILTER`).
            system_call_filter: number("Seccomp")? == 2,
            capabilities,
        })
    }
}

/// The first number of a field of `/proc/PID/status`.
fn first_number(status: &str, field: &str) -> Option<u32> {
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

fn trimmed(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim_end().to_owned())
}

/// The entries of a directory of `/proc` that are numbers, in order.
fn numbers(directory: &Path) -> io::Result<Vec<u32>> {
    let names = fs::read_dir(directory)?.flatten().map(|entry| entry.file_name());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_the_one_in_force() {
        let limits =
            |size: &str| format!("Max data size  0  0  bytes\nMax core file size   {size}   7   bytes\n");
        let core = |size| limit(&limits(size), "Max core file size");
        assert_eq!(["0", "1", "unlimited"].map(core), [Some(0), Some(1), None]);
        assert_eq!(limit("", "Max core file size"), None);
    }

    #[test]
    fn cgroups_are_those_that_are_not_the_root() {
        let lines = "4:memory:/pods/one\n3:cpu,cpuacct:/\n1:name=systemd:/one\n0::/\n";
        assert_eq!(cgroups(lines), ["memory:/pods/one", "name=systemd:/one"]);
        assert_eq!(cgroups("0::/pods/one\n"), ["0::/pods/one"]);
    }

    #[test]
    fn a_process_is_read_as_it_is() {
        // One with a thread that stays: this one has those of other tests.
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::read(child.id());
        child.kill().and_then(|()| child.wait()).unwrap();
        let process = process.unwrap();
        assert!(!process.own_root && process.own_namespaces.values().all(|own| !own));
        let thread = process.threads.iter().find(|thread| thread.tid == process.pid).unwrap();
        assert_eq!(thread.uid, rustix::process::geteuid().as_raw());
        assert!(!thread.system_call_filter && process.descriptors > 0);
    }
}
