//! The control connection: frames in, frames out, and no waiting for either.
//!
//! Bytes are kept until they make a frame, and frames are kept until the host takes them, so a slow host never
//! stops the loop. What the host leaves lying is bounded: see [`MAX_UNSENT_BYTES`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use sandbox_protocol::frame::{self, FrameError};
use sandbox_protocol::{FromAgent, Hello, MAX_TO_GUEST_BYTES, MAX_TO_HOST_BYTES, Request};
use serde::Serialize;

/// The bytes in front of a frame: its length.
const HEADER_BYTES: usize = 4;

/// A host that leaves this much unread is taken for dead.
const MAX_UNSENT_BYTES: usize = 8 << 20;

/// The least room for what is read at once.
const READ_BYTES: usize = 64 << 10;

/// The most room that is kept for what comes next. To have it made each time writes to pages here and there, each of
/// which a child may have a copy of.
const MAX_KEPT_BYTES: usize = 2 * READ_BYTES;

/// Why the control connection is of no more use. Each of them ends the guest.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The host closed it.
    #[error("the host closed the control connection")]
    Closed,
    /// It failed.
    #[error("the control connection failed: {0}")]
    Io(#[from] io::Error),
    /// The host sent something that is no request, or a frame could not be made.
    #[error("the control connection: {0}")]
    Frame(#[from] FrameError),
    /// The host does not read.
    #[error("the host left {0} bytes of replies and events unread")]
    HostStalled(usize),
}

/// The control connection.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Control {
    /// Takes a connected socket over and makes it non-blocking.
    pub fn new(socket: OwnedFd) -> Result<Self, ControlError> {
        rustix::io::ioctl_fionbio(&socket, true).map_err(io::Error::from)?;
        Ok(Self { socket, incoming: Vec::new(), outgoing: Vec::new() })
    }

    /// Sends the first frame.
    pub fn hello(&mut self, hello: &Hello) -> Result<(), ControlError> {
        self.queue(hello)?;
        self.flush()
    }

    /// Has a reply or an event sent with the next [`Self::flush`]: several that go together wake the host once.
    pub fn send(&mut self, what: &FromAgent) -> Result<(), ControlError> {
        self.queue(what)
    }

    fn queue(&mut self, what: &impl Serialize) -> Result<(), ControlError> {
        Ok(frame::write(&mut self.outgoing, what, MAX_TO_HOST_BYTES)?)
    }

    /// Hands the host what it takes; the rest waits until it takes more.
    pub fn flush(&mut self) -> Result<(), ControlError> {
        let mut sent = 0;
        while let Some(rest) = self.outgoing.get(sent..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.socket, rest) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        self.outgoing.drain(..sent);
        match self.outgoing.len() {
            unsent if unsent > MAX_UNSENT_BYTES => Err(ControlError::HostStalled(unsent)),
            _ => Ok(()),
        }
    }

    /// Reads what has come and returns the whole requests in it.
    pub fn receive(&mut self) -> Result<Vec<Request>, ControlError> {
        let mut requests = Vec::new();
        loop {
            // Not cleared: pages that a child has a copy of cost a fault each.
            self.incoming.reserve(READ_BYTES);
            match rustix::io::read(&self.socket, rustix::buffer::spare_capacity(&mut self.incoming)) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(requests),
                Err(e) => return Err(io::Error::from(e).into()),
            }
            while let Some(request) = take_frame(&mut self.incoming)? {
                requests.push(request);
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Takes the first frame out of what has come, if it is all there.
fn take_frame(bytes: &mut Vec<u8>) -> Result<Option<Request>, FrameError> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let length = u32::from_le_bytes(*header);
    if length > MAX_TO_GUEST_BYTES {
        return Err(FrameError::TooLong { length: length.into(), limit: MAX_TO_GUEST_BYTES });
    }
    let end = HEADER_BYTES + length as usize;
    let Some(mut whole) = bytes.get(..end) else { return Ok(None) };
    let request = frame::read(&mut whole, MAX_TO_GUEST_BYTES)?;
    bytes.drain(..end);
    if bytes.is_empty() && bytes.capacity() > MAX_KEPT_BYTES {
        // A large frame must not keep its memory for good.
        *bytes = Vec::new();
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sandbox_protocol::Call;

    fn frames(requests: &[Request]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for request in requests {
            frame::write(&mut bytes, request, MAX_TO_GUEST_BYTES).unwrap();
        }
        bytes
    }

    #[test]
    fn a_frame_is_taken_only_when_it_is_whole() {
        let request = Request { id: 7, call: Call::Start { container: "c".into() } };
        let whole = frames(std::slice::from_ref(&request));
        let mut bytes = Vec::new();
        for (i, byte) in whole.iter().enumerate() {
            bytes.push(*byte);
            let taken = take_frame(&mut bytes).unwrap();
            assert_eq!(taken.is_some(), i + 1 == whole.len());
        }
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_come() {
        let mut bytes = (MAX_TO_GUEST_BYTES + 1).to_le_bytes().to_vec();
        assert!(matches!(take_frame(&mut bytes), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn requests_come_out_of_one_read_and_the_end_is_told() {
        let (host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut control = Control::new(guest.into()).unwrap();
        let sent: Vec<Request> = (0..3)
            .map(|id| Request { id, call: Call::Delete { container: "c".into(), share: None } })
            .collect();
        std::io::Write::write_all(&mut &host, &frames(&sent)).unwrap();
        assert_eq!(control.receive().unwrap(), sent);
        drop(host);
        assert!(matches!(control.receive(), Err(ControlError::Closed)));
    }
}
