//! Requests to the agent, and which of them are still to be answered.
//!
//! A guest that does not read must not hold up the driver, so requests go through a short queue to a thread
//! that writes them.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sandbox_protocol::{Call, MAX_TO_GUEST_BYTES, Outcome, Reply, Request, frame};

use crate::sandbox::{Event, Sender};
use crate::thread;

/// How many requests may wait to be written.
const QUEUE_LENGTH: usize = 16;

/// How many requests may be unanswered.
const MAX_UNANSWERED: usize = 256;

/// Why a request cannot be made, or an answer not be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallsError {
    /// The agent does not read, or does not answer.
    #[error("it has stopped reading or answering requests")]
    Stuck,
    /// It answered what was never asked.
    #[error("it answered request {0}, which was never made or is answered already")]
    UnknownAnswer(u64),
}

/// The requests to one agent; dropping them ends its connection. `T` is what the asker wants to remember until the answer comes.
#[derive(Debug)]
pub struct Calls<T> {
    connection: UnixStream,
    queue: SyncSender<Request>,
    unanswered: HashMap<u64, T>,
    next_id: u64,
}

impl<T> Calls<T> {
    /// Makes requests over a connection. A write that fails arrives as [`Event::AgentLost`].
    pub fn over(connection: UnixStream, sender: Sender) -> io::Result<Self> {
        let (queue, requests) = sync_channel(QUEUE_LENGTH);
        let writer = connection.try_clone()?;
        thread::spawn("agent-calls", move || write(writer, &requests, &sender))?;
        Ok(Self { connection, queue, unanswered: HashMap::new(), next_id: 1 })
    }

    /// Asks for something.
    pub fn ask(&mut self, call: Call, remember: T) -> Result<(), CallsError> {
        if self.unanswered.len() >= MAX_UNANSWERED {
            return Err(CallsError::Stuck);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.queue.try_send(Request { id, call }).map_err(|_| CallsError::Stuck)?;
        self.unanswered.insert(id, remember);
        Ok(())
    }

    /// Takes an answer: what was remembered for it, and how it went.
    pub fn answered(&mut self, reply: Reply) -> Result<(T, Outcome), CallsError> {
        let remembered = self.unanswered.remove(&reply.id).ok_or(CallsError::UnknownAnswer(reply.id))?;
        Ok((remembered, reply.outcome))
    }

    /// What was remembered for all that are still to be answered, and will not be.
    pub fn give_up(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(&mut self.unanswered).into_values()
    }
}

impl<T> Drop for Calls<T> {
    fn drop(&mut self) {
        // The threads that read and write it hold it as well.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

fn write(mut connection: UnixStream, requests: &Receiver<Request>, sender: &Sender) {
    for request in requests {
        if let Err(error) = frame::write(&mut connection, &request, MAX_TO_GUEST_BYTES) {
            let _ = sender.send(Event::AgentLost(format!("a request could not be sent: {error}")));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Inbox;

    fn calls() -> (Calls<&'static str>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Calls::over(ours, Inbox::new().sender()).unwrap(), theirs)
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let (mut calls, mut agent) = calls();
        calls.ask(Call::PowerOff, "first").unwrap();
        calls.ask(Call::PowerOff, "second").unwrap();
        let mut read = || frame::read::<Request>(&mut agent, MAX_TO_GUEST_BYTES).unwrap().unwrap().id;
        let (first, second) = (read(), read());
        let done = |id| Reply { id, outcome: Outcome::Done };
        assert_eq!(calls.answered(done(second)), Ok(("second", Outcome::Done)));
        assert_eq!(calls.answered(done(first)), Ok(("first", Outcome::Done)));
    }

    #[test]
    fn answers_to_nothing_are_refused() {
        let (mut calls, _agent) = calls();
        calls.ask(Call::PowerOff, "only").unwrap();
        let done = |id| Reply { id, outcome: Outcome::Done };
        assert_eq!(calls.answered(done(99)), Err(CallsError::UnknownAnswer(99)));
        calls.answered(done(1)).unwrap();
        assert_eq!(calls.answered(done(1)), Err(CallsError::UnknownAnswer(1)));
    }

    #[test]
    fn an_agent_that_reads_nothing_gets_an_end_of_requests_and_nobody_waits() {
        let (mut calls, _agent) = calls();
        let big = || Call::Start { container: "x".repeat(1 << 20) };
        let made = std::iter::from_fn(|| calls.ask(big(), "big").ok()).take(1000).count();
        assert!(made < 1000);
    }
}
