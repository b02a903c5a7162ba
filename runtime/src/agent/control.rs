//! The control connection, guest to host.

use std::io::{BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use sandbox_protocol::frame::{self, FrameError};
use sandbox_protocol::{FromAgent, Hello, MAX_TO_HOST_BYTES, VERSION};

use crate::listening::{ListenError, Listening};
use crate::sandbox::{Event, Sender};
use crate::thread;

/// How long the agent may take from dialling to its first frame.
const HELLO_TIME: Duration = Duration::from_secs(10);

/// Waits for the agent on a socket, in a thread of its own. The first connection is the agent's; its end is the
/// end of the sandbox, and there is no second.
pub fn listen_for_agent(path: &Path, sender: Sender) -> Result<Listening, ListenError> {
    let (listening, listener) = Listening::on(path)?;
    let body = move || {
        let lost = match listener.accept() {
            Ok((connection, _)) => {
                // Whoever dials again is turned away, and not kept waiting for somebody to take it.
                let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
                converse(connection, &sender)
            }
            Err(error) => format!("its connection could not be taken: {error}"),
        };
        let _ = sender.send(Event::AgentLost(lost));
    };
    thread::spawn("agent", body).map_err(ListenError::at(path))?;
    Ok(listening)
}

/// Turns what the agent sends into events. Returns why it ended.
fn converse(mut connection: UnixStream, sender: &Sender) -> String {
    match greet(&mut connection) {
        Ok((hello, writer)) => {
            if sender.send(Event::AgentReady(hello, writer)).is_err() {
                return String::new();
            }
        }
        Err(why) => return why,
    }
    // The agent sends several that go together.
    let mut messages = BufReader::new(connection);
    loop {
        match frame::read::<FromAgent>(&mut messages, MAX_TO_HOST_BYTES) {
            Ok(Some(message)) => {
                if sender.send(Event::Agent(message)).is_err() {
                    return String::new();
                }
            }
            Ok(None) => return "it closed its connection".into(),
            Err(error) => return describe(&error),
        }
    }
}

fn greet(connection: &mut UnixStream) -> Result<(Hello, UnixStream), String> {
    let io = |error: std::io::Error| format!("its connection failed: {error}");
    connection.set_read_timeout(Some(HELLO_TIME)).map_err(io)?;
    let hello = read_hello(connection)?;
    connection.set_read_timeout(None).map_err(io)?;
    Ok((hello, connection.try_clone().map_err(io)?))
}

fn read_hello(from: &mut impl Read) -> Result<Hello, String> {
    match frame::read::<Hello>(from, MAX_TO_HOST_BYTES) {
        Ok(Some(hello)) if hello.version == VERSION => Ok(hello),
        Ok(Some(hello)) => Err(format!(
            "it speaks version {} of the protocol, and this runtime version {VERSION}: the guest image is of another \
             release; rebuild or reinstall it",
            hello.version
        )),
        Ok(None) => Err("it closed its connection".into()),
        Err(error) => Err(describe(&error)),
    }
}

fn describe(error: &FrameError) -> String {
    match error {
        FrameError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "its connection ended in the middle of a message".into()
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use sandbox_protocol::{Outcome, Reply};

    use super::*;
    use crate::sandbox::Inbox;

    const HELLO: &str = r#"{"version": 2, "kernel": "6.12", "kernel_micros": 1, "agent_micros": 2}"#;

    fn framed(json: &str) -> Vec<u8> {
        [&(json.len() as u32).to_le_bytes(), json.as_bytes()].concat()
    }

    /// What the driver sees of a guest that sends `bytes` and closes.
    fn events(bytes: &[u8]) -> Vec<Event> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let inbox = Inbox::new();
        theirs.write_all(bytes).unwrap();
        drop(theirs);
        let lost = converse(ours, &inbox.sender());
        inbox.sender().send(Event::AgentLost(lost)).unwrap();
        std::iter::from_fn(|| inbox.next(Some(std::time::Instant::now()))).collect()
    }

    fn lost(bytes: &[u8]) -> String {
        match events(bytes).pop() {
            Some(Event::AgentLost(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_good_agent_is_heard() {
        let reply = r#"{"kind": "reply", "id": 7, "outcome": "done"}"#;
        let events = events(&[framed(HELLO), framed(reply)].concat());
        assert!(matches!(&events[0], Event::AgentReady(hello, _) if hello.kernel == "6.12"));
        let expected = Reply { id: 7, outcome: Outcome::Done };
        assert!(matches!(&events[1], Event::Agent(FromAgent::Reply(reply)) if *reply == expected));
        assert!(matches!(&events[2], Event::AgentLost(_)));
    }

    #[test]
    fn what_is_against_the_protocol_ends_the_conversation() {
        let other = HELLO.replace("\"version\": 2", "\"version\": 9");
        assert!(lost(&framed(&other)).contains("version 9"));
        assert!(lost(b"").contains("closed its connection"));
        assert!(lost(&[1, 0]).contains("in the middle"));
        assert!(lost(&u32::MAX.to_le_bytes()).contains("over the limit"));
        assert!(lost(&framed("{")).contains("not what was expected"));
        assert!(
            lost(&[framed(HELLO), framed(r#"{"kind": "order"}"#)].concat()).contains("not what was expected")
        );
        assert!(lost(&[framed(HELLO), vec![255, 255, 255, 0]].concat()).contains("over the limit"));
        assert!(lost(&[framed(HELLO), vec![9, 0, 0, 0, b'{']].concat()).contains("in the middle"));
    }
}
