//! Waiting for processes, and for those that a process left behind.
//!
//! A monitor and its client are both subreapers: a grandchild whose parent was killed becomes their child, so
//! that it can be found, waited for and, when it does not end by itself, killed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

/// How long the processes that a killed one has left may take to end by themselves.
pub const ORPHAN_TIME: Duration = Duration::from_secs(5);

/// How often orphans are looked for: they come one after the other, as each level of a tree ends.
const ORPHAN_POLL: Duration = Duration::from_millis(2);

/// How long a killed process may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(2);

/// Makes this process the one that its descendants fall to.
pub fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// A descriptor of a child that has not been waited for.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until a process has ended; it stays to be reaped. `false`: it has not, by the deadline.
pub fn wait_for(pidfd: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Err(rustix::io::Errno::INTR) => {}
            // An error has no better answer than that of a process that cannot be waited for.
            Ok(_) | Err(_) => return true,
        }
    }
}

/// Reaps every child that is left, and kills those that are still there at the deadline.
pub fn reap_orphans(deadline: Instant) {
    while has_children() {
        let late = Instant::now().saturating_duration_since(deadline);
        // A process that a SIGKILL does not end is stuck in the kernel, and waiting does not help it.
        if late > KILL_TIME {
            return;
        }
        if !late.is_zero() {
            kill_children();
        }
        std::thread::sleep(ORPHAN_POLL);
    }
}

/// Reaps the dead children. Whether there are living ones.
fn has_children() -> bool {
    loop {
        match rustix::process::waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Kills every child. They cannot be mistaken for others: none has been reaped since the list was made.
fn kill_children() {
    for child in children(std::process::id()) {
        if let Ok(pidfd) = pidfd(child) {
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// A process and all that it has started, as far as they still have each other for parents.
pub fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let children = children(*pid);
        found.extend(children);
        next += 1;
    }
    found
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.map(|task| std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper(seconds: &str) -> Child {
        Command::new("sleep").arg(seconds).spawn().unwrap()
    }

    #[test]
    fn a_live_process_runs_into_the_deadline_and_a_dead_one_does_not() {
        let mut child = sleeper("60");
        let pidfd = pidfd(child.id()).unwrap();
        assert!(!wait_for(&pidfd, Instant::now() + Duration::from_millis(10)));
        child.kill().unwrap();
        assert!(wait_for(&pidfd, Instant::now() + Duration::from_secs(60)));
        child.wait().unwrap();
    }

    #[test]
    fn a_family_has_children_and_their_children() {
        let mut child = Command::new("sh").args(["-c", "sleep 60 & wait"]).spawn().unwrap();
        while family(child.id()).len() < 2 {
            std::thread::sleep(ORPHAN_POLL);
        }
        let found = family(child.id());
        assert_eq!((found.len(), found[0]), (2, child.id()));
        assert!(family(std::process::id()).contains(&found[1]));
        let grandchild = pidfd(found[1]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        rustix::process::pidfd_send_signal(&grandchild, Signal::KILL).unwrap();
        assert!(wait_for(&grandchild, Instant::now() + Duration::from_secs(60)));
    }

    #[test]
    fn a_process_that_does_not_exist_has_no_descriptor() {
        assert!(pidfd(u32::MAX).is_err());
        assert!(pidfd(0).is_err());
    }
}
