//! The processes of a container, as the agent sees them in its own `/proc`.
//!
//! What is read of a process is the container's to write: names and arguments are bounded, and so is the whole.
//! The kernel reads a process's arguments out of its memory, and a container with the rights to serve page
//! faults of the kernel's (`CAP_SYS_PTRACE` for userfaultfd, `/dev/fuse` for a file of its own) can hold that up.
//! No container has them unless its configuration says so, and the host waits for no answer without end.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use rustix::thread::ClockId;
use sandbox_protocol::{MAX_TO_HOST_BYTES, ProcessInfo, Processes};

use super::cgroup::{CgroupError, file_error, subdirectories};
use crate::bounded::{self, Text};

/// The most cgroups visited: the container may have made any number of them.
const MAX_CGROUPS: usize = 1024;

/// The most bytes read of a list of pids, enough for as many as a guest may have.
const MAX_LIST_BYTES: usize = 1 << 20;

/// The most bytes read of a file about a process; the kernel writes some hundred.
const MAX_PROC_BYTES: usize = 16 << 10;

/// The most bytes of a command line.
const MAX_COMMAND_BYTES: usize = 1024;

/// The most bytes of a table in a frame; the rest of it is for what stands round the table.
const MAX_TABLE_BYTES: usize = MAX_TO_HOST_BYTES as usize - 1024;

/// The kernel's unit of time in `/proc`, on every x86-64.
const TICKS_PER_SECOND: u64 = 100;
const MILLIS_PER_TICK: u64 = 1000 / TICKS_PER_SECOND;

/// The major number of the terminals in `/dev/pts`.
const PTS_MAJOR: u32 = 136;

/// Reads the processes in a cgroup and below it, as many as an answer holds.
pub fn read(cgroup: &Path) -> Result<Processes, CgroupError> {
    let members = members(cgroup)?;
    let boot = boot_ticks();
    let processes = members.pids.into_iter().filter_map(|pid| process(pid, boot));
    let (processes, full) = that_fit(processes, MAX_TABLE_BYTES);
    Ok(Processes { processes, truncated: full || members.cut })
}

struct Members {
    pids: Vec<u32>,
    cut: bool,
}

fn members(cgroup: &Path) -> Result<Members, CgroupError> {
    let (mut pids, mut cut) = (Vec::new(), false);
    let mut left = VecDeque::from([cgroup.to_owned()]);
    let mut seen = 0;
    while let Some(directory) = left.pop_front() {
        if seen == MAX_CGROUPS {
            cut = true;
            break;
        }
        seen += 1;
        let list = directory.join("cgroup.procs");
        match bounded::read_text(&list, MAX_LIST_BYTES) {
            Ok(Text { text, cut: more }) => {
                pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
                cut |= more;
            }
            Err(e) if directory == cgroup => return Err(file_error("read", &list, e)),
            // It was just removed, or holds threads, whose processes are listed further up.
            Err(_) => {}
        }
        left.extend(subdirectories(&directory));
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(Members { pids, cut })
}

/// The first processes whose table is of at most `limit` bytes, and whether there are more.
fn that_fit(processes: impl Iterator<Item = ProcessInfo>, limit: usize) -> (Vec<ProcessInfo>, bool) {
    let mut fitting = Vec::new();
    let mut bytes = 0;
    for process in processes {
        // With the comma behind it.
        bytes += serde_json::to_vec(&process).map_or(limit, |json| json.len() + 1);
        if bytes > limit {
            return (fitting, true);
        }
        fitting.push(process);
    }
    (fitting, false)
}

/// When the kernel started, in ticks since the epoch.
fn boot_ticks() -> u64 {
    let ticks = |clock| {
        let now = rustix::time::clock_gettime(clock);
        now.tv_sec as u64 * TICKS_PER_SECOND + now.tv_nsec as u64 * TICKS_PER_SECOND / 1_000_000_000
    };
    ticks(ClockId::Realtime).saturating_sub(ticks(ClockId::Boottime))
}

/// `None`: it has ended.
fn process(pid: u32, boot_ticks: u64) -> Option<ProcessInfo> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let text = |file: &str| Some(bounded::read_text(&directory.join(file), MAX_PROC_BYTES).ok()?.text);
    let stat = text("stat")?;
    let stat = Stat::parse(&stat)?;
    let arguments = bounded::read(&directory.join("cmdline"), MAX_COMMAND_BYTES).ok()?;
    Some(ProcessInfo {
        pid,
        ppid: stat.ppid,
        uid: effective_uid(&text("status")?)?,
        state: stat.state,
        start_seconds: boot_ticks.saturating_add(stat.start_ticks) / TICKS_PER_SECOND,
        cpu_millis: stat.cpu_ticks.saturating_mul(MILLIS_PER_TICK),
        tty: terminal_name(stat.terminal),
        command: command(&arguments, stat.name),
    })
}

/// What `/proc/PID/stat` says.
#[derive(Debug, PartialEq)]
struct Stat<'a> {
    name: &'a str,
    state: char,
    ppid: u32,
    terminal: u32,
    cpu_ticks: u64,
    start_ticks: u64,
}

impl<'a> Stat<'a> {
    /// The name is the process's own choice and may hold anything, brackets too; nothing behind it does.
    fn parse(text: &'a str) -> Option<Self> {
        let (before, after) = text.rsplit_once(')')?;
        let name = before.split_once('(')?.1;
        let fields: Vec<&str> = after.split_whitespace().collect();
        // Numbered as in proc_pid_stat(5), where the name is the second.
        let field = |number: usize| fields.get(number - 3).copied();
        let number = |of: usize| field(of)?.parse::<u64>().ok();
        Some(Self {
            name,
            state: field(3)?.chars().next()?,
            ppid: field(4)?.parse().ok()?,
            terminal: field(7)?.parse::<i32>().ok()? as u32,
            cpu_ticks: number(14)?.saturating_add(number(15)?),
            start_ticks: number(22)?,
        })
    }
}

/// The second number behind `Uid:` in `/proc/PID/status`, where the kernel writes a newline in a name as `\n`.
fn effective_uid(status: &str) -> Option<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().nth(1)?.parse().ok()
}

/// A device number as the kernel packs it: 12 bits of minor above and 8 below 12 bits of major.
fn terminal_name(device: u32) -> Option<String> {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    match major {
        0 => None,
        PTS_MAJOR => Some(format!("pts/{minor}")),
        _ => Some(format!("{major}:{minor}")),
    }
}

fn command(arguments: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(arguments);
    match text.trim_end_matches('\0') {
        "" => format!("[{name}]"),
        text => text.replace('\0', " "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sandbox_protocol::{FromAgent, Outcome, Reply, frame};

    const REST: &str = "S 1 5 5 34817 5 4194560 1 2 3 4 150 50 0 0 20 0 1 0 1234 99 9";

    #[test]
    fn a_stat_is_read_whatever_the_name_is() {
        for name in ["sh", "a) R 9 (b", "", "x\ny", "(((", ") ) )"] {
            let text = format!("7 ({name}) {REST}\n");
            let stat = Stat { name, state: 'S', ppid: 1, terminal: 34817, cpu_ticks: 200, start_ticks: 1234 };
            assert_eq!(Stat::parse(&text), Some(stat), "{name:?}");
        }
        for broken in ["", "7", "7 (sh", "7 (sh)", "7 (sh) S 1 5", "7 (sh) S x 5 5 0 5 1"] {
            assert_eq!(Stat::parse(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn the_effective_user_is_told() {
        assert_eq!(effective_uid("Name:\tUid: 0\nUid:\t1000\t33\t1000\t33\n"), Some(33));
        assert_eq!(effective_uid("Name:\tsh\nUid:\t1000\n"), None);
    }

    #[test]
    fn terminals_have_the_names_that_ps_gives_them() {
        assert_eq!(terminal_name(0), None);
        assert_eq!(terminal_name(34817), Some("pts/1".into()));
        assert_eq!(terminal_name(136 << 8 | 1 << 20), Some("pts/256".into()));
        assert_eq!(terminal_name(4 << 8 | 64), Some("4:64".into()));
    }

    #[test]
    fn a_command_is_its_arguments_or_else_its_name() {
        assert_eq!(command(b"sleep\x005\x00", "sleep"), "sleep 5");
        assert_eq!(command(b"a\x00\x00b\x00", "a"), "a  b");
        assert_eq!(command(b"caf\xff", "x"), "caf\u{fffd}");
        assert_eq!(command(b"", "kworker"), "[kworker]");
    }

    #[test]
    fn a_table_ends_before_it_is_too_long_for_a_frame() {
        let process = |pid| ProcessInfo {
            pid,
            ppid: 1,
            uid: 0,
            state: 'R',
            start_seconds: 0,
            cpu_millis: 0,
            tty: None,
            command: "\u{1}".repeat(MAX_COMMAND_BYTES),
        };
        let (processes, full) = that_fit((1..).map(process), MAX_TABLE_BYTES);
        assert!(full && processes.len() > 20);
        let outcome = Outcome::Processes(Processes { processes, truncated: full });
        let reply = FromAgent::Reply(Reply { id: u64::MAX, outcome });
        frame::write(&mut Vec::new(), &reply, MAX_TO_HOST_BYTES).unwrap();
        assert!(!that_fit([process(1)].into_iter(), MAX_TABLE_BYTES).1);
    }

    #[test]
    fn this_process_is_in_the_table() {
        let this = process(std::process::id(), boot_ticks()).unwrap();
        assert!(this.command.contains("sandbox"), "{}", this.command);
        assert_eq!(this.uid, rustix::process::geteuid().as_raw());
    }
}
