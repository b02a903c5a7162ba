//! How a shim comes to its end: not before whoever it serves has every answer.
//!
//! containerd closes a connection when it has the answer to its last request there, and takes what it has not heard
//! until then for a failure. The server of the task service does not tell when an answer is out; that all those before
//! have been handed to it is counted here, and that the last one has come is seen by the connection's end.
//!
//! The same holds for one container, whose connection containerd closes when it has the answer to its removal: that
//! waits for the answers of the kills that have led to it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::ttrpc::{MethodHandler, Request, Result, TtrpcContext};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// How long an answer may take that the end waits for, and how long its receiver may take to hang up.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// The requests that the end does not wait for: those that wait for an end themselves, and those that bring it about.
const UNCOUNTED: [&str; 4] = ["/Wait", "/WaitSandbox", "/Shutdown", "/ShutdownSandbox"];

/// What leads to a container's end, and what follows from it.
const KILL: &str = "/Kill";
const REMOVAL: &str = "/Delete";

/// The methods of a service, by their paths.
type Methods = HashMap<String, Box<dyn MethodHandler + Send + Sync>>;

/// Tells when a shim has nothing left to do.
#[derive(Debug, Default)]
pub struct Over {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many requests have not been answered.
    owed: usize,
    /// How many of them are kills.
    kills: usize,
    over: bool,
    /// The connection of whoever has ended it.
    last: Option<OwnedFd>,
}

impl Over {
    /// Has the end wait for the answers of these methods.
    pub fn count(self: &Arc<Self>, methods: Methods) -> Methods {
        let counted = |(path, method): (String, _)| match UNCOUNTED.iter().any(|end| path.ends_with(end)) {
            true => (path, method),
            false => {
                let (kills, removes) = (path.ends_with(KILL), path.ends_with(REMOVAL));
                (path, Box::new(Counted { method, kills, removes, over: Arc::clone(self) }) as Box<_>)
            }
        };
        methods.into_iter().map(counted).collect()
    }

    /// Tells that it is over, as is asked on this connection, once all others have been answered.
    pub fn tell(&self, connection: RawFd) {
        let mut state = self.settled(|state| state.owed);
        state.over = true;
        state.last = copy(connection).ok();
        self.changed.notify_all();
    }

    /// Waits until it is over.
    pub fn wait(&self) {
        let waits = |state: &mut State| !state.over;
        drop(self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until whoever has ended it has the answer to that, and hangs up.
    pub fn wait_for_hangup(&self) {
        let Some(connection) = self.state().last.take() else { return };
        let time = Timespec::try_from(ANSWER_TIME).unwrap_or_default();
        let _ = rustix::event::poll(&mut [PollFd::new(&connection, PollFlags::RDHUP)], Some(&time));
    }

    /// Waits until none of these answers is owed any more, for as long as one may take.
    fn settled(&self, owed: impl Fn(&State) -> usize) -> MutexGuard<'_, State> {
        let owes = |state: &mut State| owed(state) > 0;
        let settled = self.changed.wait_timeout_while(self.state(), ANSWER_TIME, owes);
        settled.unwrap_or_else(PoisonError::into_inner).0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A descriptor of this process's that somebody else may close.
fn copy(descriptor: RawFd) -> io::Result<OwnedFd> {
    let this = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&this, descriptor, PidfdGetfdFlags::empty())?)
}

/// A method whose answers are waited for.
struct Counted {
    method: Box<dyn MethodHandler + Send + Sync>,
    kills: bool,
    removes: bool,
    over: Arc<Over>,
}

impl MethodHandler for Counted {
    fn handler(&self, context: TtrpcContext, request: Request) -> Result<()> {
        let kills = usize::from(self.kills);
        {
            let mut state = self.over.state();
            (state.owed, state.kills) = (state.owed + 1, state.kills + kills);
        }
        if self.removes {
            drop(self.over.settled(|state| state.kills));
        }
        let handed_over = self.method.handler(context, request);
        {
            let mut state = self.over.state();
            (state.owed, state.kills) = (state.owed - 1, state.kills - kills);
        }
        self.over.changed.notify_all();
        handed_over
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_end_is_told_when_every_answer_is_out_and_comes_with_the_hangup() {
        let over = Arc::new(Over::default());
        let (ours, theirs) = UnixStream::pair().unwrap();
        over.state().owed = 1;
        let (teller, descriptor) = (Arc::clone(&over), ours.as_raw_fd());
        let told = std::thread::spawn(move || teller.tell(descriptor));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!over.state().over);
        over.state().owed = 0;
        over.changed.notify_all();
        told.join().unwrap();
        over.wait();
        drop(ours);
        let hanging_up = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(theirs);
        });
        let since = Instant::now();
        over.wait_for_hangup();
        assert!(since.elapsed() >= Duration::from_millis(50));
        hanging_up.join().unwrap();
    }

    #[test]
    fn a_removal_waits_for_the_answers_of_kills() {
        let over = Arc::new(Over::default());
        over.state().kills = 1;
        let waiter = Arc::clone(&over);
        let removal = std::thread::spawn(move || {
            let since = Instant::now();
            drop(waiter.settled(|state| state.kills));
            since.elapsed()
        });
        std::thread::sleep(Duration::from_millis(50));
        over.state().kills = 0;
        over.changed.notify_all();
        assert!((Duration::from_millis(50)..ANSWER_TIME).contains(&removal.join().unwrap()));
    }

    #[test]
    fn an_answer_that_does_not_come_holds_the_end_up_for_its_time() {
        let over = Over::default();
        over.state().owed = 1;
        over.tell(RawFd::MAX);
        over.wait();
        over.wait_for_hangup();
    }
}
