//! A monitor's socket, by which other commands ask something of its sandbox: one line of JSON there, one back.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::sandbox::{Answer, Event, Request, Sender};
use crate::thread;

/// The most bytes of a line.
const MAX_LINE_BYTES: u64 = 16 << 10;

/// How long either side waits for the other's line.
const LINE_TIME: Duration = Duration::from_secs(2);

/// How long the sandbox may take to do what it is asked.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Why a sandbox did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens, or the connection failed.
    #[error("the sandbox cannot be asked over {}: {error}", path.display())]
    Connection {
        /// The socket.
        path: std::path::PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

/// Answers requests on a socket, one at a time, in a thread of its own.
pub fn listen(path: &Path, sender: Sender) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    thread::spawn("requests", move || {
        for connection in listener.incoming().map_while(Result::ok) {
            // A caller that does not keep to the rules has only itself to blame.
            let _ = serve(connection, &sender);
        }
    })?;
    Ok(())
}

fn serve(mut connection: UnixStream, sender: &Sender) -> io::Result<()> {
    let request: Request = read_line(&connection, LINE_TIME)?;
    let (answer_to, answer) = sync_channel(1);
    let answer = match sender.send(Event::Request(request, Some(answer_to))) {
        Ok(()) => answer.recv_timeout(ANSWER_TIME).unwrap_or_else(|_| Answer::refused(NO_ANSWER)),
        Err(_) => Answer::refused("the sandbox is ending"),
    };
    connection.write_all(&line(&answer)?)
}

const NO_ANSWER: &str = "the sandbox did not answer; it may be ending";

/// Asks the sandbox whose socket this is.
pub fn ask(socket: &Path, request: &Request) -> Result<(), AskError> {
    let exchange = || {
        let mut connection = UnixStream::connect(socket)?;
        connection.write_all(&line(request)?)?;
        read_line(&connection, ANSWER_TIME + LINE_TIME)
    };
    match exchange() {
        Ok(Answer::Done) => Ok(()),
        Ok(Answer::Refused { message }) => Err(AskError::Refused(crate::printable::printable(&message))),
        Err(error) => Err(AskError::Connection { path: socket.into(), error }),
    }
}

fn line(value: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

fn read_line<T: DeserializeOwned>(from: &UnixStream, limit: Duration) -> io::Result<T> {
    from.set_read_timeout(Some(limit))?;
    let mut line = Vec::new();
    BufReader::new(from.take(MAX_LINE_BYTES)).read_until(b'\n', &mut line)?;
    if !line.ends_with(b"\n") {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Inbox;

    #[test]
    fn a_request_reaches_the_driver_and_its_answer_the_asker() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let inbox = Inbox::new();
        listen(&path, inbox.sender()).unwrap();
        let asker = {
            let path = path.clone();
            std::thread::spawn(move || {
                (ask(&path, &Request::Signal { signal: 15 }), ask(&path, &Request::Interrupt))
            })
        };
        for (expected, answer) in
            [(Request::Signal { signal: 15 }, Answer::Done), (Request::Interrupt, Answer::refused("no"))]
        {
            match inbox.next(None).unwrap() {
                Event::Request(request, Some(to)) if request == expected => to.send(answer).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        let (first, second) = asker.join().unwrap();
        first.unwrap();
        assert_eq!(second.unwrap_err().to_string(), "no");
    }

    #[test]
    fn nonsense_is_hung_up_on() {
        let inbox = Inbox::new();
        for bytes in [&b"{}\n"[..], b"\n", b"[1,2", &[b'x'; 20_000]] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(bytes).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(serve(ours, &inbox.sender()).is_err());
        }
        assert!(inbox.next(Some(std::time::Instant::now())).is_none());
    }
}
