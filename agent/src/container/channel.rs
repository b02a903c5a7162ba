//! The line between the agent and a child that sets itself up.
//!
//! A pair of sockets that keep message borders. The first process of a container first waits for one byte, until the
//! agent has given it its rights and ids. A child that is held sends [`Said::Ready`] when it is about to execute its
//! program and waits for a byte; one that fails sends [`Said::Failed`] and ends. Its end is closed on exec, so the end of
//! the line means that the program runs, or that the child is gone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::PidfdGetfdFlags;
use sandbox_protocol::Failure;
use serde::{Deserialize, Serialize};

/// The most messages of a child, the end included, and one to spare.
pub const MAX_MESSAGES: usize = 4;

/// What a child says.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
enum Said {
    Ready { terminal: Option<i32> },
    Failed(Failure),
}

/// What the agent hears.
#[derive(Debug, PartialEq)]
pub enum Heard {
    /// Nothing for now.
    Nothing,
    /// The child waits for the word; the master of its terminal is this descriptor of its own.
    Ready {
        /// The descriptor's number in the child.
        terminal: Option<i32>,
    },
    /// The child could not be set up, or its program not be executed.
    Failed(Failure),
    /// The line is closed.
    End,
}

/// Makes a line: the agent's end, which never blocks, and the child's.
pub fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (agent, child) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&agent, true)?;
    Ok((agent, child))
}

/// Hears one message, on the agent's side. The buffer has room for the longest failure, whose text is bounded.
pub fn hear(channel: &OwnedFd, buffer: &mut [u8]) -> Heard {
    match recv(channel, &mut *buffer, RecvFlags::empty()) {
        Ok((0, _)) => Heard::End,
        Ok((length, _)) => match serde_json::from_slice(buffer.get(..length).unwrap_or_default()) {
            Ok(Said::Ready { terminal }) => Heard::Ready { terminal },
            Ok(Said::Failed(failure)) => Heard::Failed(failure),
            Err(_) => Heard::Nothing,
        },
        Err(Errno::AGAIN | Errno::INTR) => Heard::Nothing,
        Err(_) => Heard::End,
    }
}

/// Gives the word, on the agent's side.
pub fn let_go(channel: &OwnedFd) -> io::Result<()> {
    send(channel, b"!", SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Fetches a copy of a descriptor of the child's, which must be waiting.
pub fn fetch(child: &OwnedFd, fd: i32) -> Result<OwnedFd, io::Error> {
    Ok(rustix::process::pidfd_getfd(child.as_fd(), fd, PidfdGetfdFlags::empty())?)
}

/// Says that the child is ready and waits for the word, on the child's side.
///
/// # Errors
///
/// The agent is gone.
pub fn ready_and_wait(channel: &OwnedFd, terminal: Option<i32>) -> io::Result<()> {
    say(channel, &Said::Ready { terminal })?;
    wait_for_word(channel)
}

/// Waits for the word, on the child's side.
///
/// # Errors
///
/// The agent is gone.
pub fn wait_for_word(channel: &OwnedFd) -> io::Result<()> {
    let mut word = [0; 1];
    loop {
        match recv(channel, &mut word, RecvFlags::empty()) {
            Ok((1, _)) => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Says why the child gives up, on the child's side.
pub fn give_up(channel: &OwnedFd, failure: Failure) {
    // The agent sees the end of the line where this cannot be sent.
    let _ = say(channel, &Said::Failed(failure));
}

fn say(channel: &OwnedFd, what: &Said) -> io::Result<()> {
    let bytes = serde_json::to_vec(what)?;
    send(channel, &bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sandbox_protocol::FailureKind;

    #[test]
    fn a_child_that_fails_is_heard_and_then_its_end() {
        let (agent, child) = pair().unwrap();
        let hear = |channel: &OwnedFd| hear(channel, &mut [0; 32 << 10]);
        assert_eq!(hear(&agent), Heard::Nothing);
        let failure = Failure { kind: FailureKind::UnknownUser, message: "no".into() };
        give_up(&child, failure.clone());
        drop(child);
        assert_eq!(hear(&agent), Heard::Failed(failure));
        assert_eq!(hear(&agent), Heard::End);
    }

    #[test]
    fn a_child_waits_for_the_word() {
        let (agent, child) = pair().unwrap();
        let_go(&agent).unwrap();
        ready_and_wait(&child, Some(5)).unwrap();
        assert_eq!(hear(&agent, &mut [0; 32 << 10]), Heard::Ready { terminal: Some(5) });
        drop(agent);
        assert!(ready_and_wait(&child, None).is_err());
    }
}
