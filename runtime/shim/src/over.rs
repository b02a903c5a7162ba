//! How a shim comes to its end: not before whoever it serves has every answer.
//!
//! containerd has a connection for each container, closes it when it has the answer to its last request there, and takes
//! what it has not heard when the shim ends for a failure. The server of the task service does not tell when an answer is
//! out; that all have been handed to it is counted here, and that those of late have come is seen by the ends of their
//! connections.
//!
//! The same holds for one container, whose connection containerd closes when it has the answer to its removal: that
//! waits for the answers of the kills that have led to it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::ttrpc::{MethodHandler, Request, Result, TtrpcContext};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// How long an answer may take that the end waits for, and how long its receiver may take to hang up. One that is older
/// has come.
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
    /// The connections that have had an answer of late, by their numbers, and when.
    answered: HashMap<RawFd, (OwnedFd, Instant)>,
}

impl State {
    /// Notes that there was an answer on this connection, and forgets those that have come.
    fn answered(&mut self, number: RawFd, connection: OwnedFd) {
        let now = Instant::now();
        self.answered.retain(|_, (_, at)| now.duration_since(*at) < ANSWER_TIME);
        self.answered.insert(number, (connection, now));
    }
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
        if let Ok(copy) = copy(connection) {
            state.answered(connection, copy);
        }
        self.changed.notify_all();
    }

    /// Waits until it is over.
    pub fn wait(&self) {
        let waits = |state: &mut State| !state.over;
        drop(self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until whoever had an answer of late has it, and hangs up.
    pub fn wait_for_hangup(&self) {
        let deadline = Instant::now() + ANSWER_TIME;
        let answered = std::mem::take(&mut self.state().answered);
        for (connection, _) in answered.into_values() {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let _ = rustix::event::poll(&mut [PollFd::new(&connection, PollFlags::RDHUP)], Some(&left));
        }
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
        let (number, connection) = (context.fd, copy(context.fd));
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
            match connection {
                Ok(connection) if handed_over.is_ok() => state.answered(number, connection),
                // There is no answer: the server closes the connection, and its end is to be seen.
                _ => drop(state.answered.remove(&number)),
            }
        }
        self.over.changed.notify_all();
        handed_over
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::sync::mpsc::{Sender, channel};

    use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse, Empty, ShutdownRequest};
    use containerd_shim_protos::ttrpc::{self, Server};
    use containerd_shim_protos::{Client, Task, TaskClient, create_task};

    use super::*;

    /// How long a container takes to be made, and its client to hang up.
    const PAUSE: Duration = Duration::from_millis(100);

    /// How long anything may take at most.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Tells that it begins to make a container, and makes none; is over when that is asked.
    struct Service {
        over: Arc<Over>,
        begun: Sender<()>,
    }

    impl Task for Service {
        fn create(&self, _: &TtrpcContext, _: CreateTaskRequest) -> Result<CreateTaskResponse> {
            self.begun.send(()).unwrap();
            std::thread::sleep(PAUSE);
            Err(ttrpc::Error::Others("none is made".into()))
        }

        fn shutdown(&self, context: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
            self.over.tell(context.fd);
            Ok(Empty::default())
        }
    }

    fn client(socket: &Path) -> TaskClient {
        TaskClient::new(Client::connect(&format!("unix://{}", socket.display())).unwrap())
    }

    fn context() -> ttrpc::context::Context {
        ttrpc::context::with_duration(PATIENCE)
    }

    #[test]
    fn the_end_comes_when_every_client_has_its_answer_and_has_hung_up() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let over = Arc::new(Over::default());
        let listener = UnixListener::bind(&socket).unwrap().into_raw_fd();
        let (begun, begins) = channel();
        let methods = over.count(create_task(Arc::new(Service { over: Arc::clone(&over), begun })));
        let mut server = Server::new().add_listener(listener).unwrap().register_service(methods);
        server.start().unwrap();

        let (making, ending) = (client(&socket), client(&socket));
        let maker = std::thread::spawn(move || {
            let answer = making.create(context(), &CreateTaskRequest::default());
            std::thread::sleep(PAUSE);
            let hung_up = Instant::now();
            drop(making);
            (answer.unwrap_err().to_string(), hung_up)
        });
        begins.recv_timeout(PATIENCE).unwrap();
        let ender = std::thread::spawn(move || ending.shutdown(context(), &ShutdownRequest::default()));
        over.wait();
        assert_eq!(over.state().owed, 0);
        over.wait_for_hangup();
        let end = Instant::now();
        ender.join().unwrap().unwrap();
        let (answer, hung_up) = maker.join().unwrap();
        assert!(answer.contains("none is made"), "{answer}");
        assert!(end >= hung_up);
        server.shutdown();
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
