//! Where the guest dials for the streams of its processes.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use sandbox_protocol::{MAX_STREAM_HELLO_BYTES, StreamHello, frame};

use crate::listening::{ListenError, Listening};
use crate::sandbox::{Event, Sender};
use crate::thread;

/// How long a connection may take to say what it carries. One that does not keeps the next one waiting, which
/// harms nobody but its own guest.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Waits for stream connections, in a thread of its own. A connection that says nothing sensible is closed;
/// whether one that does is wanted is the driver's to say.
pub fn listen_for_streams(path: &Path, sender: Sender) -> Result<Listening, ListenError> {
    let (listening, listener) = Listening::on(path)?;
    let body = move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let Some((hello, connection)) = admit(connection) else { continue };
            if sender.send(Event::StreamOpened(hello, connection)).is_err() {
                return;
            }
        }
    };
    thread::spawn("streams", body).map_err(ListenError::at(path))?;
    Ok(listening)
}

fn admit(mut connection: UnixStream) -> Option<(StreamHello, UnixStream)> {
    connection.set_read_timeout(Some(HELLO_TIME)).ok()?;
    let hello = frame::read(&mut connection, MAX_STREAM_HELLO_BYTES).ok()??;
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
        admit(ours)
    }

    #[test]
    fn not_a_byte_of_the_stream_itself_is_swallowed() {
        let json = r#"{"container": "c", "stream": "stdout"}"#;
        let bytes = [&(json.len() as u32).to_le_bytes(), json.as_bytes(), b"data"].concat();
        let (hello, mut rest) = admitted(&bytes).unwrap();
        assert_eq!(
            hello,
            StreamHello { container: "c".into(), process: String::new(), stream: Stream::Stdout }
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
