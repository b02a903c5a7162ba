//! Where the guest dials for the streams of its processes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use sandbox_protocol::{MAX_STREAM_HELLO_BYTES, StreamHello, frame};

use crate::listening::{ListenError, Listening};
use crate::sandbox::{Event, Sender};
use crate::thread;

/// How long a connection may take to say what it carries.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// How many connections may be about to say it. The agent says it at once.
const MAX_ARRIVING: usize = 64;

/// What the agent has to say to be let in, and no process of a container knows: every one of them can dial here.
#[derive(Clone)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// A new one, which nobody can guess.
    pub fn new() -> io::Result<Self> {
        let mut bytes = [0; 32];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(base64::engine::general_purpose::STANDARD.encode(bytes)))
    }

    /// What the agent is told.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether this is it. The time that it takes does not tell how much of it was right.
    fn is(&self, said: &str) -> bool {
        let differing = self.0.bytes().zip(said.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b));
        said.len() == self.0.len() && differing == 0
    }
}

/// Waits for stream connections, in a thread of its own. A connection that says nothing sensible, or does not know the
/// secret, is closed; whether one that does is wanted is the driver's to say.
pub fn listen_for_streams(path: &Path, secret: Secret, sender: Sender) -> Result<Listening, ListenError> {
    let (listening, listener) = Listening::on(path)?;
    listener.set_nonblocking(true).map_err(ListenError::at(path))?;
    let mut door = Door { listener, secret, arriving: VecDeque::new() };
    let body = move || {
        while let Ok(admitted) = door.attend() {
            for (hello, connection) in admitted {
                if sender.send(Event::StreamOpened(hello, connection)).is_err() {
                    return;
                }
            }
        }
    };
    thread::spawn("streams", body).map_err(ListenError::at(path))?;
    Ok(listening)
}

/// Where streams come in. Whoever takes its time with its first words keeps nobody else waiting.
struct Door {
    listener: UnixListener,
    secret: Secret,
    /// Those that have not said enough yet, the eldest first.
    arriving: VecDeque<Arriving>,
}

impl Door {
    /// Waits until something happens. Returns those that have said who they are; an error: nobody wants to know.
    fn attend(&mut self) -> io::Result<Vec<(StreamHello, UnixStream)>> {
        let now = Instant::now();
        while self.arriving.front().is_some_and(|eldest| eldest.until <= now) {
            self.arriving.pop_front();
        }
        let knocks = self.wait(now)?;
        let mut admitted = Vec::new();
        let mut waiting = VecDeque::new();
        for mut arriving in self.arriving.drain(..) {
            match arriving.listen() {
                Heard::Part => waiting.push_back(arriving),
                Heard::Hello(hello) if self.secret.is(&hello.secret) => {
                    admitted.push((hello, arriving.connection));
                }
                Heard::Hello(_) | Heard::Nonsense => {}
            }
        }
        self.arriving = waiting;
        if knocks {
            self.let_in()?;
        }
        Ok(admitted)
    }

    /// Waits for somebody to come, or to say something, or to have had its time. Returns whether somebody came.
    fn wait(&self, now: Instant) -> io::Result<bool> {
        let time = self.arriving.front().map(|eldest| eldest.until.saturating_duration_since(now));
        let time = time.map(|time| Timespec::try_from(time).unwrap_or_default());
        let connections = self.arriving.iter().map(|arriving| arriving.connection.as_fd());
        let mut ready: Vec<PollFd<'_>> = std::iter::once(self.listener.as_fd())
            .chain(connections)
            .map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN))
            .collect();
        match rustix::event::poll(&mut ready, time.as_ref()) {
            Ok(_) => Ok(ready.first().is_some_and(|listener| !listener.revents().is_empty())),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes one more in, in the place of the eldest where there is no room.
    fn let_in(&mut self) -> io::Result<()> {
        match self.listener.accept() {
            Ok((connection, _)) => {
                if self.arriving.len() >= MAX_ARRIVING {
                    self.arriving.pop_front();
                }
                self.arriving.push_back(Arriving::new(connection));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A connection that has not said yet who it is.
struct Arriving {
    connection: UnixStream,
    /// What has come of its first frame.
    said: Vec<u8>,
    until: Instant,
}

/// What a connection has said.
enum Heard {
    /// Not all of it yet.
    Part,
    /// Who it is.
    Hello(StreamHello),
    /// Nothing that makes sense, or nothing at all to its end.
    Nonsense,
}

impl Arriving {
    fn new(connection: UnixStream) -> Self {
        Self { connection, said: Vec::new(), until: Instant::now() + HELLO_TIME }
    }

    /// Takes what is there of the first frame, and not a byte of what follows.
    fn listen(&mut self) -> Heard {
        loop {
            let missing = match frame::missing(&self.said, MAX_STREAM_HELLO_BYTES) {
                Ok(0) => break,
                Ok(missing) => missing,
                Err(_) => return Heard::Nonsense,
            };
            let mut bytes = vec![0; missing];
            match rustix::net::recv(&self.connection, &mut *bytes, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Heard::Nonsense,
                Ok((came, _)) => self.said.extend(bytes.get(..came).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Heard::Part,
                Err(_) => return Heard::Nonsense,
            }
        }
        match frame::read(&mut self.said.as_slice(), MAX_STREAM_HELLO_BYTES) {
            Ok(Some(hello)) => Heard::Hello(hello),
            _ => Heard::Nonsense,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use sandbox_protocol::Stream;

    use super::*;
    use crate::sandbox::Inbox;

    fn admitted(bytes: &[u8]) -> Option<(StreamHello, UnixStream)> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        drop(theirs);
        let mut arriving = Arriving::new(ours);
        match arriving.listen() {
            Heard::Hello(hello) if Secret("word".into()).is(&hello.secret) => {
                Some((hello, arriving.connection))
            }
            _ => None,
        }
    }

    fn framed(json: &str) -> Vec<u8> {
        [&(json.len() as u32).to_le_bytes(), json.as_bytes()].concat()
    }

    #[test]
    fn whoever_does_not_know_the_secret_is_turned_away() {
        for secret in ["", "wor", "words", "Word", "drow"] {
            let json = format!(r#"{{"container": "c", "stream": "stdin", "secret": "{secret}"}}"#);
            assert!(admitted(&framed(&json)).is_none(), "{secret}");
        }
        assert!(admitted(&framed(r#"{"container": "c", "stream": "stdin"}"#)).is_none());
        let (one, other) = (Secret::new().unwrap(), Secret::new().unwrap());
        assert!(one.is(one.text()) && !one.is(other.text()));
    }

    #[test]
    fn not_a_byte_of_the_stream_itself_is_swallowed() {
        let json = r#"{"container": "c", "stream": "stdout", "secret": "word"}"#;
        let bytes = [&framed(json)[..], b"data"].concat();
        let (hello, mut rest) = admitted(&bytes).unwrap();
        assert_eq!(
            hello,
            StreamHello {
                container: "c".into(),
                process: String::new(),
                stream: Stream::Stdout,
                secret: "word".into()
            }
        );
        let mut data = String::new();
        rest.read_to_string(&mut data).unwrap();
        assert_eq!(data, "data");
    }

    #[test]
    fn whoever_says_nothing_keeps_nobody_waiting_and_the_eldest_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let (path, secret, inbox) = (dir.path().join("s"), Secret::new().unwrap(), Inbox::new());
        let _listening = listen_for_streams(&path, secret.clone(), inbox.sender()).unwrap();
        let dial = || UnixStream::connect(&path).unwrap();
        let mut silent: Vec<_> = (0..MAX_ARRIVING).map(|_| dial()).collect();
        let mut good = dial();
        let json = format!(r#"{{"container": "c", "stream": "stdin", "secret": "{}"}}"#, secret.text());
        let framed = framed(&json);
        let (first, rest) = framed.split_at(20);
        good.write_all(first).unwrap();
        assert_eq!(silent[0].read(&mut [0]).unwrap(), 0);
        good.write_all(rest).unwrap();
        let event = inbox.next(Some(Instant::now() + Duration::from_secs(60)));
        assert!(matches!(event, Some(Event::StreamOpened(hello, _)) if hello.container == "c"));
    }

    #[test]
    fn nonsense_is_turned_away() {
        for bytes in [&b""[..], b"\x01", b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x00\x08\0\0"] {
            assert!(admitted(bytes).is_none());
        }
    }
}
