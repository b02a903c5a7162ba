//! The bytes of standard streams, carried between a process and the host.
//!
//! A [`Pump`] moves the bytes of one direction: from a pipe to a connection, from a connection to a pipe, or
//! either way between a terminal and a connection. It reads only when everything it read before has been taken,
//! so a slow reader holds its writer back and nothing piles up.
//!
//! Both ends of a pump are registered edge-triggered, and a pump runs until one of them has nothing to give or
//! take. Between two edges it is left alone; a pump that has had its share of one round is run again in the
//! next, before anything is waited for.

use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::stdio::{Line, StdioError};

/// The most bytes that one read takes.
pub const BUFFER_BYTES: usize = 64 << 10;

/// The most reads of a pump in one round, so that one stream cannot starve the others.
const READS_PER_ROUND: usize = 16;

/// Where a pump carries to.
#[derive(Debug)]
pub enum Sink {
    /// A pipe or a terminal: closing it ends it.
    File(OwnedFd),
    /// A connection: its direction is shut down.
    Connection(OwnedFd),
    /// A connection to be: the host is dialled when there is something to carry.
    Line(Line),
}

/// What a pump wants after a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// To be run at the next edge.
    Waiting,
    /// To be run again soon.
    Ready,
    /// To be connected: there is something to carry.
    Unconnected,
    /// Nothing more: every byte up to the source's end has been handed over.
    Done,
    /// Nothing more: one end is gone, and what was on its way with it.
    Broken,
}

/// One direction of a stream.
#[derive(Debug)]
pub struct Pump {
    source: OwnedFd,
    sink: Sink,
    pending: Vec<u8>,
    at_end: bool,
    ends_when_dry: bool,
    sink_gone: bool,
}

impl Pump {
    /// Makes a pump of two descriptors of its own, and makes both non-blocking.
    pub fn new(source: OwnedFd, sink: Sink) -> rustix::io::Result<Self> {
        let pump =
            Self { source, sink, pending: Vec::new(), at_end: false, ends_when_dry: false, sink_gone: false };
        for end in std::iter::once(&pump.source).chain(pump.sink()) {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(pump)
    }

    fn sink(&self) -> Option<&OwnedFd> {
        match &self.sink {
            Sink::File(sink) | Sink::Connection(sink) => Some(sink),
            Sink::Line(_) => None,
        }
    }

    /// What it was to be connected to, if it has not been.
    pub fn line(&self) -> Option<&Line> {
        match &self.sink {
            Sink::Line(line) => Some(line),
            _ => None,
        }
    }

    /// Registers both ends, the source as the number's double and the sink as that plus one.
    pub fn register(&self, epoll: &OwnedFd, number: u64) -> rustix::io::Result<()> {
        let source = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(epoll, &self.source, EventData::new_u64(number * 2), source)?;
        self.register_sink(epoll, number)
    }

    fn register_sink(&self, epoll: &OwnedFd, number: u64) -> rustix::io::Result<()> {
        let Some(sink) = self.sink() else { return Ok(()) };
        epoll::add(epoll, sink, EventData::new_u64(number * 2 + 1), EventFlags::OUT | EventFlags::ET)
    }

    /// Dials the host for what there is to carry.
    pub fn connect(&mut self, epoll: &OwnedFd, number: u64) -> Result<(), StdioError> {
        let Sink::Line(line) = &self.sink else { return Ok(()) };
        let connection = line.dial()?;
        rustix::io::ioctl_fionbio(&connection, true)?;
        self.sink = Sink::Connection(connection);
        Ok(self.register_sink(epoll, number)?)
    }

    /// Notes that the sink's reader is gone, which ends the pump even when there is nothing to write.
    pub fn note(&mut self, token: u64, flags: EventFlags) {
        if token % 2 == 1 && flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            self.sink_gone = true;
        }
    }

    /// Undoes [`Self::register`]; closing would not, where a duplicate of the descriptor is open.
    pub fn unregister(&self, epoll: &OwnedFd) {
        for end in std::iter::once(&self.source).chain(self.sink()) {
            let _ = epoll::delete(epoll, end);
        }
    }

    /// From now on, a source that has nothing to give is at its end: its writer is gone, and what it wrote is
    /// all there, although a stranger may still hold the other end open.
    pub fn end_when_dry(&mut self) {
        self.ends_when_dry = true;
    }

    /// Carries what there is to carry.
    pub fn run(&mut self, buffer: &mut [u8]) -> Progress {
        for _ in 0..READS_PER_ROUND {
            if self.line().is_some() && !self.pending.is_empty() {
                return Progress::Unconnected;
            }
            match self.flush() {
                Ok(true) => {}
                Ok(false) => return self.waiting(),
                Err(_) => return Progress::Broken,
            }
            if self.at_end {
                self.end_sink();
                return Progress::Done;
            }
            match rustix::io::read(&self.source, &mut *buffer) {
                Ok(0) => self.at_end = true,
                Ok(n) => self.pending.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.ends_when_dry => self.at_end = true,
                Err(Errno::AGAIN) => return self.waiting(),
                // What a terminal reads as when its last user has closed it.
                Err(Errno::IO) => self.at_end = true,
                Err(_) => return Progress::Broken,
            }
        }
        Progress::Ready
    }

    /// Hands over what was read; false: the sink takes no more for now.
    fn flush(&mut self) -> rustix::io::Result<bool> {
        let mut taken = 0;
        let mut full = false;
        while let (Some(sink), Some(rest)) = (self.sink(), self.pending.get(taken..)) {
            if rest.is_empty() {
                break;
            }
            match rustix::io::write(sink, rest) {
                Ok(n) => taken += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    full = true;
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        self.pending.drain(..taken);
        Ok(!full)
    }

    fn waiting(&self) -> Progress {
        if self.sink_gone { Progress::Broken } else { Progress::Waiting }
    }

    fn end_sink(&self) {
        if let Sink::Connection(connection) = &self.sink {
            let _ = rustix::net::shutdown(connection, Shutdown::Write);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    struct Rig {
        writer: Option<std::io::PipeWriter>,
        reader: UnixStream,
        pump: Pump,
        buffer: Vec<u8>,
    }

    fn rig() -> Rig {
        let (source, writer) = std::io::pipe().unwrap();
        let (sink, reader) = UnixStream::pair().unwrap();
        let pump = Pump::new(source.into(), Sink::Connection(sink.into())).unwrap();
        Rig { writer: Some(writer), reader, pump, buffer: vec![0; BUFFER_BYTES] }
    }

    #[test]
    fn bytes_and_the_end_are_carried() {
        let mut rig = rig();
        assert_eq!(rig.pump.run(&mut rig.buffer), Progress::Waiting);
        rig.writer.take().unwrap().write_all(b"hello").unwrap();
        assert_eq!(rig.pump.run(&mut rig.buffer), Progress::Done);
        let mut got = String::new();
        rig.reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "hello");
    }

    #[test]
    fn a_reader_that_does_not_read_holds_the_pump_back_and_loses_nothing() {
        let mut rig = rig();
        let mut writer = rig.writer.take().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut written = 0;
        // Until the connection, the pump and the pipe are all full.
        loop {
            let progress = rig.pump.run(&mut rig.buffer);
            match writer.write(&[7; 4096]) {
                Ok(n) => written += n,
                Err(_) if progress == Progress::Waiting => break,
                Err(_) => {}
            }
        }
        assert!(rig.pump.pending.len() <= BUFFER_BYTES);
        drop(writer);
        rig.reader.set_nonblocking(true).unwrap();
        let mut read = 0;
        let mut bytes = vec![0; 1 << 16];
        while rig.pump.run(&mut rig.buffer) != Progress::Done {
            read += rig.reader.read(&mut bytes).unwrap_or(0);
        }
        rig.reader.set_nonblocking(false).unwrap();
        read += rig.reader.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(read, written);
    }

    #[test]
    fn a_source_that_a_stranger_holds_open_ends_when_dry() {
        let mut rig = rig();
        rig.writer.as_mut().unwrap().write_all(b"last words").unwrap();
        rig.pump.end_when_dry();
        assert_eq!(rig.pump.run(&mut rig.buffer), Progress::Done);
        let mut got = [0; 10];
        rig.reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"last words");
    }

    #[test]
    fn a_reader_that_is_gone_breaks_the_pump() {
        let mut rig = rig();
        drop(rig.reader);
        rig.pump.note(1, EventFlags::HUP);
        assert_eq!(rig.pump.run(&mut rig.buffer), Progress::Broken);
    }
}
