//! The event socket: what the runtime is told, and the sign that it is gone.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sandbox_vmm_api::{EVENT_FD, VmEvent};

/// How long a runtime may leave an event unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// The event socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("descriptor {EVENT_FD} is not the event socket: {0}; this program is started by the sandbox runtime")]
pub struct NoEventSocket(#[source] io::Error);

/// The runtime at the other end.
#[derive(Debug)]
pub struct EventSocket(UnixStream);

/// Whether the runtime is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It is.
    There,
    /// It has closed its end, or has died.
    Gone,
}

impl EventSocket {
    /// Takes the descriptor that the runtime has left for it. To be called once.
    pub fn inherited() -> Result<Self, NoEventSocket> {
        // SAFETY: F_GETFD touches no memory and answers for any number.
        if unsafe { libc::fcntl(EVENT_FD, libc::F_GETFD) } < 0 {
            return Err(NoEventSocket(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is open, as was just seen, and nothing else in this process owns it: it was
        // inherited, and this is called once.
        Self::new(unsafe { OwnedFd::from_raw_fd(EVENT_FD) }).map_err(NoEventSocket)
    }

    fn new(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)?;
        rustix::net::sockopt::socket_type(&descriptor)?;
        let stream = UnixStream::from(descriptor);
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Self(stream))
    }

    /// Tells the runtime; one that is gone is told nothing.
    pub fn send(&self, event: &VmEvent) {
        let mut line = match serde_json::to_vec(event) {
            Ok(line) => line,
            Err(error) => return tracing::error!(%error, "an event cannot be written as JSON"),
        };
        line.push(b'\n');
        if let Err(error) = (&self.0).write_all(&line) {
            tracing::debug!(%error, "the runtime does not take an event");
        }
    }

    /// Looks at the socket when it is readable; the runtime sends nothing, so all there can be is its end.
    pub fn peer(&self) -> Peer {
        let mut ignored = [0; 64];
        match (&self.0).read(&mut ignored) {
            Ok(0) => Peer::Gone,
            Ok(_) => Peer::There,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                Peer::There
            }
            Err(_) => Peer::Gone,
        }
    }
}

impl AsFd for EventSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use sandbox_vmm_api::ExitReason;

    use super::*;

    #[test]
    fn events_are_lines_and_the_end_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let events = EventSocket::new(ours.into()).unwrap();
        events.send(&VmEvent::Exited { reason: ExitReason::PowerOff });
        let mut line = [0; 128];
        let count = (&theirs).read(&mut line).unwrap();
        let expected = br#"{"event":"exited","reason":{"kind":"power-off"}}"#;
        assert_eq!(line[..count].strip_suffix(b"\n"), Some(&expected[..]));
        drop(theirs);
        assert_eq!(events.peer(), Peer::Gone);
        events.send(&VmEvent::Exited { reason: ExitReason::PowerOff });
    }

    #[test]
    fn something_else_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(EventSocket::new(file.into()).is_err());
    }
}
