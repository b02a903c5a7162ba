//! Where the guest dials for the streams of its processes.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use sandbox_protocol::{MAX_STREAM_HELLO_BYTES, StreamHello, frame};

use crate::listening::{ListenError, Listening};
use crate::sandbox::{Event, Sender};
use crate::thread;

/// How long a connection may take to say what it carries. One that does not keeps the next one waiting, which
/// harms nobody but its own guest.
const HELLO_TIME: Duration = Duration::from_secs(5);

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
    pub fn new() -> std::io::Result<Self> {
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
    let body = move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let Some((hello, connection)) = admit(connection, &secret) else { continue };
            if sender.send(Event::StreamOpened(hello, connection)).is_err() {
                return;
            }
        }
    };
    thread::spawn("streams", body).map_err(ListenError::at(path))?;
    Ok(listening)
}

fn admit(mut connection: UnixStream, secret: &Secret) -> Option<(StreamHello, UnixStream)> {
    connection.set_read_timeout(Some(HELLO_TIME)).ok()?;
    let hello: StreamHello = frame::read(&mut connection, MAX_STREAM_HELLO_BYTES).ok()??;
    if !secret.is(&hello.secret) {
        return None;
    }
    connection.set_read_timeout(None).ok()?;
    Some((hello, connection))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use sandbox_protocol::Stream;

    use super::*;

    fn admitted(bytes: &[u8]) -> Option<(StreamHello, UnixStream)> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        drop(theirs);
        admit(ours, &Secret("word".into()))
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
    fn nonsense_is_turned_away() {
        for bytes in [&b""[..], b"\x01", b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x00\x08\0\0"] {
            assert!(admitted(bytes).is_none());
        }
    }
}
