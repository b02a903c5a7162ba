//! Moving the bytes of one stream.
//!
//! One thread per stream, blocking on both sides: whoever is slow slows the other down, and nothing is kept but
//! one buffer. Descriptors that we inherited stay as they are (making them non-blocking would change them for
//! the shell as well).

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::thread;

/// The size of the buffer: what a unix socket hands over at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// The key that ends a terminal's input (`VEOF`, Ctrl-D).
const END_OF_INPUT: u8 = 4;

/// Which way a stream goes.
#[derive(Debug)]
pub enum Direction {
    /// From one of our descriptors to the guest. The end of the one becomes the end of the other.
    ToGuest(OwnedFd),
    /// The same to a terminal in the guest, which goes on after the end: a terminal's end of input is a key.
    KeysToGuest(OwnedFd),
    /// From the guest to one of our descriptors.
    FromGuest(OwnedFd),
}

/// How a transfer ended.
#[derive(Debug)]
pub enum Transfer {
    /// At the end of its source, every byte of it delivered.
    Complete,
    /// The receiver wanted no more.
    ReceiverGone,
    /// A descriptor of ours failed.
    Failed(io::Error),
    /// The guest could not hand over what there was, and says why.
    Lost(String),
}

/// How far a transfer has come, for those who wait for its end.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
    delivering: AtomicBool,
    finished: AtomicBool,
}

impl Progress {
    /// The bytes delivered so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Whether it waits for the receiver, and not for the source.
    pub fn is_delivering(&self) -> bool {
        self.delivering.load(Ordering::Relaxed)
    }
}

/// Starts the transfer of one stream in a thread of its own, which calls `done` at its end.
pub fn start(
    name: &str,
    direction: Direction,
    guest: UnixStream,
    progress: Arc<Progress>,
    done: impl FnOnce(Transfer) + Send + 'static,
) -> io::Result<()> {
    thread::spawn(name, move || {
        let transfer = match direction {
            Direction::ToGuest(ours) => {
                let (transfer, _) = copy(ours.as_fd(), guest.as_fd(), &progress);
                let _ = guest.shutdown(Shutdown::Write);
                transfer
            }
            Direction::KeysToGuest(ours) => {
                let (transfer, last) = copy(ours.as_fd(), guest.as_fd(), &progress);
                // Within a line, the key only hands over what has been typed of it.
                let keys: &[u8] = if last == b'\n' { &[END_OF_INPUT] } else { &[END_OF_INPUT; 2] };
                let _ = write_all(guest.as_fd(), keys);
                transfer
            }
            Direction::FromGuest(ours) => {
                let (transfer, _) = copy(guest.as_fd(), ours.as_fd(), &progress);
                // Tells the process inside that nobody listens any more.
                let _ = guest.shutdown(Shutdown::Both);
                transfer
            }
        };
        progress.finished.store(true, Ordering::Release);
        done(transfer);
    })?;
    Ok(())
}

/// Copies until one side ends. Returns how it ended, and the last byte: a line's end where there was none.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, progress: &Progress) -> (Transfer, u8) {
    let mut last = b'\n';
    let transfer = copy_noting(from, to, progress, &mut last);
    (transfer, last)
}

fn copy_noting(from: BorrowedFd<'_>, to: BorrowedFd<'_>, progress: &Progress, last: &mut u8) -> Transfer {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = match rustix::io::read(from, &mut buffer) {
            Ok(0) => return Transfer::Complete,
            Ok(read) => read,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                wait(from, PollFlags::IN);
                continue;
            }
            // The machine went away, or the terminal was hung up: an end like any other.
            Err(Errno::CONNRESET | Errno::IO) => return Transfer::Complete,
            Err(error) => return Transfer::Failed(error.into()),
        };
        progress.delivering.store(true, Ordering::Relaxed);
        let bytes = buffer.get(..read).unwrap_or_default();
        *last = bytes.last().copied().unwrap_or(*last);
        let written = write_all(to, bytes);
        progress.delivering.store(false, Ordering::Relaxed);
        match written {
            Ok(()) => progress.bytes.fetch_add(read as u64, Ordering::Relaxed),
            Err(Errno::PIPE | Errno::CONNRESET) => return Transfer::ReceiverGone,
            Err(error) => return Transfer::Failed(error.into()),
        };
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(to, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits for a descriptor that somebody else has made non-blocking.
fn wait(descriptor: BorrowedFd<'_>, what: PollFlags) {
    let _ = rustix::event::poll(&mut [PollFd::new(&descriptor, what)], None);
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::sync::mpsc;

    use super::*;

    fn run(direction: Direction, guest: UnixStream) -> mpsc::Receiver<(Transfer, u64)> {
        let (sender, receiver) = mpsc::channel();
        let progress = Arc::new(Progress::default());
        let seen = Arc::clone(&progress);
        start("test", direction, guest, progress, move |transfer| {
            sender.send((transfer, seen.bytes())).unwrap();
        })
        .unwrap();
        receiver
    }

    #[test]
    fn output_arrives_whole_and_its_end_is_told() {
        let (guest, mut inside) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let done = run(Direction::FromGuest(writer.into()), guest);
        let feeder = std::thread::spawn(move || inside.write_all(&vec![7; 1 << 20]));
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        feeder.join().unwrap().unwrap();
        assert_eq!(all, vec![7; 1 << 20]);
        assert!(matches!(done.recv().unwrap(), (Transfer::Complete, 0x10_0000)));
    }

    #[test]
    fn the_end_of_input_is_the_end_inside() {
        let (guest, mut inside) = UnixStream::pair().unwrap();
        let _other_direction = guest.try_clone().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        let done = run(Direction::ToGuest(reader.into()), guest);
        writer.write_all(b"input").unwrap();
        drop(writer);
        let mut all = String::new();
        inside.read_to_string(&mut all).unwrap();
        assert_eq!(all, "input");
        assert!(matches!(done.recv().unwrap(), (Transfer::Complete, 5)));
        // The other direction of a terminal's connection goes on.
        assert!(inside.write_all(b"echo").is_ok());
    }

    #[test]
    fn the_end_of_input_to_a_terminal_is_a_key() {
        for (input, expected) in [("", "\x04"), ("line\n", "line\n\x04"), ("part", "part\x04\x04")] {
            let (guest, mut inside) = UnixStream::pair().unwrap();
            let (reader, mut writer) = io::pipe().unwrap();
            let done = run(Direction::KeysToGuest(reader.into()), guest);
            writer.write_all(input.as_bytes()).unwrap();
            drop(writer);
            done.recv().unwrap();
            let mut all = String::new();
            inside.read_to_string(&mut all).unwrap();
            assert_eq!(all, expected);
        }
    }

    #[test]
    fn a_reader_that_left_is_told_to_the_guest() {
        let (guest, mut inside) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let done = run(Direction::FromGuest(writer.into()), guest);
        inside.write_all(b"lost").unwrap();
        assert!(matches!(done.recv().unwrap(), (Transfer::ReceiverGone, 0)));
        assert_eq!(inside.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let (guest, mut inside) = UnixStream::pair().unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let done = run(Direction::FromGuest(full.into()), guest);
        inside.write_all(b"lost").unwrap();
        let (transfer, _) = done.recv().unwrap();
        assert!(matches!(transfer, Transfer::Failed(e) if e.kind() == io::ErrorKind::StorageFull));
    }
}
