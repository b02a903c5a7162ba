//! A process of a container: how it is, how it ended, and whoever waits for that.
//!
//! ```text
//!  Created ──started──► Running ◄──paused, resumed──► Paused
//!     └───────────────────┴──────────ended──────────────┴──────► Stopped
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use oci_spec::runtime::Process as Spec;
use sandbox_runtime::monitor::Asker;

use crate::error::Error;
use crate::stdio::{Held, Streams};

/// What it is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// It waits to be started.
    Created,
    /// It runs.
    Running,
    /// It is held.
    Paused,
    /// It has ended.
    Stopped,
}

/// How and when it ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Exit {
    /// Its exit code, or 128 and the signal that killed it.
    pub code: u32,
    /// When.
    pub at: SystemTime,
}

impl Exit {
    /// One that has just come.
    pub fn now(code: u32) -> Self {
        Self { code, at: SystemTime::now() }
    }
}

/// How it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct State {
    /// What it is doing.
    pub status: Status,
    /// The process of the host that stands for it; 0: there is none yet.
    pub pid: u32,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// A process that was added to a container.
#[derive(Debug)]
pub struct Addition {
    /// What to run.
    pub spec: Spec,
    /// Whoever runs it, once it runs.
    pub asker: Mutex<Option<Asker>>,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its name in the container; empty: the container's first.
    pub name: String,
    /// Its streams, as containerd named them.
    pub streams: Streams,
    /// What an added process has besides.
    pub addition: Option<Addition>,
    state: Mutex<State>,
    changed: Condvar,
    held: Mutex<Held>,
    telling: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// A process that waits to be started.
    pub fn new(name: String, streams: Streams, addition: Option<Spec>) -> Self {
        Self {
            name,
            streams,
            addition: addition.map(|spec| Addition { spec, asker: Mutex::new(None) }),
            state: Mutex::new(State { status: Status::Created, pid: 0, exit: None }),
            changed: Condvar::new(),
            held: Mutex::default(),
            telling: Mutex::new(()),
        }
    }

    /// How it is.
    pub fn state(&self) -> State {
        *lock(&self.state)
    }

    /// Only whoever has this may tell containerd what becomes of it: its start must not be told after its end.
    pub fn telling(&self) -> MutexGuard<'_, ()> {
        lock(&self.telling)
    }

    /// Holds our ends of its streams, until it is deleted.
    pub fn hold(&self, held: Held) {
        *lock(&self.held) = held;
    }

    /// Lets go of its streams. Waits for programs that log.
    pub fn let_go(&self) {
        let held = std::mem::take(&mut *lock(&self.held));
        drop(held);
    }

    /// Lets its input end.
    pub fn close_stdin(&self) {
        lock(&self.held).close_stdin();
    }

    /// Notes which process of the host stands for it.
    pub fn stands(&self, pid: u32) {
        lock(&self.state).pid = pid;
    }

    /// Notes that it is doing something else. One that has ended does nothing else any more.
    pub fn becomes(&self, status: Status) {
        let mut state = lock(&self.state);
        if state.status != Status::Stopped {
            state.status = status;
        }
    }

    /// Notes its end, and wakes those who wait for it.
    pub fn ended(&self, exit: Exit) {
        let mut state = lock(&self.state);
        (state.status, state.exit) = (Status::Stopped, Some(exit));
        self.changed.notify_all();
    }

    /// Waits for its end. `None`: it has not come by the deadline.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<Exit> {
        let mut state = lock(&self.state);
        loop {
            if state.exit.is_some() {
                return state.exit;
            }
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// That it is doing one of these.
    pub fn expect(&self, wanted: &[Status], doing: &str) -> Result<(), Error> {
        match self.state().status {
            status if wanted.contains(&status) => Ok(()),
            Status::Stopped => Err(Error::Finished),
            status => {
                let status = match status {
                    Status::Created => "created",
                    Status::Running => "running",
                    Status::Paused => "paused",
                    Status::Stopped => "stopped",
                };
                Err(Error::State(format!("cannot {doing} a process that is {status}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_stays_so_and_whoever_waits_hears_of_it() {
        let process = Process::new(String::new(), Streams::default(), None);
        assert_eq!(process.wait(Some(Instant::now())), None);
        process.becomes(Status::Running);
        let exit = Exit { code: 3, at: SystemTime::UNIX_EPOCH };
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| process.wait(None));
            process.ended(exit);
            assert_eq!(waiter.join().unwrap(), Some(exit));
        });
        process.becomes(Status::Paused);
        assert_eq!(process.state().status, Status::Stopped);
        assert!(matches!(process.expect(&[Status::Running], "pause"), Err(Error::Finished)));
    }
}
