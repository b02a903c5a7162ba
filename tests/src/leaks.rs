//! What a sandbox may leave behind: processes, mounts, cgroups, network interfaces, sockets, files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::POLL;
use crate::sandbox::MARK;

/// How long a sandbox that was cut off may take to vanish.
const GRACE: Duration = Duration::from_secs(30);

/// By what the remains of a sandbox are recognised.
pub struct Trace {
    /// Its id, unique on the host.
    pub id: String,
    /// The test's directory, which holds its bundle (`bundle`), state (`state`) and temporary files (`tmp`).
    pub directory: PathBuf,
}

/// Waits until nothing is left.
///
/// # Panics
///
/// When something still is after [`GRACE`]; what it is is killed, so that other tests are not disturbed.
#[track_caller]
pub fn expect_none(trace: &Trace) {
    expect_empty(trace, all);
}

/// Waits until no process and no mount is left.
///
/// # Panics
///
/// As [`expect_none`].
#[track_caller]
pub fn expect_no_process(trace: &Trace) {
    expect_empty(trace, |trace| {
        let mut left = describe_processes(trace);
        left.extend(mentions(trace, "mount", "/proc/self/mountinfo"));
        left
    });
}

#[track_caller]
fn expect_empty(trace: &Trace, look: impl Fn(&Trace) -> Vec<String>) {
    let deadline = Instant::now() + GRACE;
    loop {
        let left = look(trace);
        if left.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            kill_all(trace);
            panic!("the sandbox {} left something behind:\n{}", trace.id, left.join("\n"));
        }
        std::thread::sleep(POLL);
    }
}

/// Everything that is left, each described on a line.
fn all(trace: &Trace) -> Vec<String> {
    let mut left = describe_processes(trace);
    left.extend(mentions(trace, "mount", "/proc/self/mountinfo"));
    left.extend(mentions(trace, "socket", "/proc/net/unix"));
    left.extend(interfaces(trace));
    left.extend(cgroups(trace, Path::new("/sys/fs/cgroup"), 0));
    left.extend(files(trace));
    left
}

fn describe_processes(trace: &Trace) -> Vec<String> {
    processes(trace).into_iter().map(|(pid, what)| format!("process {pid}: {what}")).collect()
}

/// Kills the processes that are left.
pub fn kill_all(trace: &Trace) {
    for (pid, _) in processes(trace) {
        // It may have ended by itself.
        let _ = kill(pid, Signal::SIGKILL);
    }
}

/// Processes that have the test's mark in their environment, or its id or directory in their command line,
/// working directory or open files.
pub fn processes(trace: &Trace) -> Vec<(Pid, String)> {
    let own = std::process::id().cast_signed();
    let entries = fs::read_dir("/proc").expect("/proc can be read").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| *pid != own)
        .filter_map(|pid| Some((Pid::from_raw(pid), recognise(trace, pid)?)))
        .collect()
}

fn recognise(trace: &Trace, pid: i32) -> Option<String> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let command = fs::read(proc.join("cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    let mark = format!("{MARK}={}", trace.id);
    let environment = fs::read(proc.join("environ")).unwrap_or_default();
    let marked = environment.split(|b| *b == 0).any(|variable| variable == mark.as_bytes());
    let named = command.contains(&trace.id) || command.contains(trace.directory.to_str()?);
    (marked || named || holds_files(trace, &proc)).then_some(command)
}

fn holds_files(trace: &Trace, proc: &Path) -> bool {
    let inside = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(&trace.directory));
    let open = fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
    inside(proc.join("cwd")) || inside(proc.join("root")) || open.map(|entry| entry.path()).any(inside)
}

/// The lines of a table of the kernel's that mention the sandbox.
fn mentions(trace: &Trace, what: &str, table: &str) -> Vec<String> {
    let text = fs::read_to_string(table).unwrap_or_default();
    let directory = trace.directory.to_string_lossy();
    let lines = text.lines().filter(|l| l.contains(&trace.id) || l.contains(&*directory));
    lines.map(|line| format!("{what}: {line}")).collect()
}

/// Network interfaces whose alias or name has the id: taps are named by the runtime, never by chance.
fn interfaces(trace: &Trace) -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let known = |name: &String| {
        let alias = fs::read_to_string(format!("/sys/class/net/{name}/ifalias")).unwrap_or_default();
        alias.contains(&trace.id) || name.contains(&trace.id)
    };
    names.filter(known).map(|name| format!("network interface: {name}")).collect()
}

/// Control groups with the id in their name.
fn cgroups(trace: &Trace, directory: &Path, depth: u32) -> Vec<String> {
    const DEEPEST: u32 = 5;
    let mut found = vec![];
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|t| t.is_dir()) || depth > DEEPEST {
            continue;
        }
        if entry.file_name().to_string_lossy().contains(&trace.id) {
            found.push(format!("cgroup: {}", entry.path().display()));
        }
        found.extend(cgroups(trace, &entry.path(), depth + 1));
    }
    found
}

/// Where a cgroup of this name would be at the top of each hierarchy.
pub fn cgroups_named(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(name)).collect()
}

/// State files, temporary files, and the sandbox's name under /run/sandbox.
fn files(trace: &Trace) -> Vec<String> {
    let below = |name: &str| fs::read_dir(trace.directory.join(name)).into_iter().flatten().flatten();
    let mut left: Vec<PathBuf> = below("tmp").map(|entry| entry.path()).collect();
    left.extend(below("state").map(|entry| entry.path()).filter(|path| !is_lock(path)));
    left.extend(Some(Path::new("/run/sandbox").join(&trace.id)).filter(|path| path.exists()));
    left.iter().map(|path| format!("file: {}", described(path))).collect()
}

/// A path with what is in it, where it is a directory: how far its owner came says when it ended.
fn described(path: &Path) -> String {
    let Ok(entries) = fs::read_dir(path) else { return path.display().to_string() };
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    format!("{} with {names:?}", path.display())
}

/// A lock file belongs to the state directory, not to a sandbox.
fn is_lock(path: &Path) -> bool {
    path.is_file() && path.file_name().is_some_and(|name| name == ".lock" || name == "lock")
}
