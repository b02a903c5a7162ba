//! QEMU's machine protocol (QMP): lines of JSON on a socket.
//!
//! QEMU greets, we ask for `qmp_capabilities`, and from then on each command has one `return` or `error`, with
//! events between them. The only event of interest is `SHUTDOWN`, which says why the machine ended and is
//! followed by the end of the process.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

/// How long QEMU may take for an answer. It answers at once, unless the host is so loaded that a user would
/// rather see this error.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The most bytes of a line: QEMU is the guest's prisoner, too.
const MAX_LINE_BYTES: u64 = 64 * 1024;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("talking to QEMU: {0}")]
    Socket(#[from] io::Error),
    /// QEMU has closed the socket.
    #[error("QEMU has ended")]
    Closed,
    /// It wrote something that is not of the protocol.
    #[error("QEMU sent a line that is not of its protocol: {0}")]
    Protocol(#[from] serde_json::Error),
    /// It refused.
    #[error("QEMU refused {command:?}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
}

/// The client's end.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    greeted: Greeted,
    shutdown_reason: Option<String>,
}

/// Whether QEMU accepts commands yet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Greeted {
    No,
    Yes,
}

impl Qmp {
    /// A client on its end of a socket pair.
    pub fn new(stream: UnixStream) -> Result<Self, Error> {
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        Ok(Self { stream: BufReader::new(stream), greeted: Greeted::No, shutdown_reason: None })
    }

    /// Runs a command without arguments.
    pub fn run(&mut self, command: &str) -> Result<(), Error> {
        if self.greeted == Greeted::No {
            self.message()?;
            self.command("qmp_capabilities")?;
            self.greeted = Greeted::Yes;
        }
        self.command(command)
    }

    /// Why the machine ended, if QEMU has said so: `guest-reset`, `guest-shutdown`, and others. To be asked
    /// when QEMU has ended.
    pub fn shutdown_reason(&mut self) -> Option<String> {
        while self.shutdown_reason.is_none() && self.message().is_ok() {}
        self.shutdown_reason.take()
    }

    fn command(&mut self, command: &str) -> Result<(), Error> {
        let mut line = json!({ "execute": command }).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let message = self.message()?;
            if message.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = message.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::Refused { command: command.to_owned(), reason: reason.to_owned() });
            }
        }
    }

    /// Reads one message and notes the event that matters.
    fn message(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        if (&mut self.stream).take(MAX_LINE_BYTES).read_line(&mut line)? == 0 {
            return Err(Error::Closed);
        }
        let message: Value = serde_json::from_str(&line)?;
        if message.get("event").and_then(Value::as_str) == Some("SHUTDOWN") {
            let reason = message.pointer("/data/reason").and_then(Value::as_str).unwrap_or("unknown");
            self.shutdown_reason = Some(reason.to_owned());
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client_and_qemu() -> (Qmp, UnixStream) {
        let (ours, qemu) = UnixStream::pair().unwrap();
        (Qmp::new(ours).unwrap(), qemu)
    }

    #[test]
    fn a_command_waits_for_its_own_answer() {
        let (mut qmp, mut qemu) = client_and_qemu();
        qemu.write_all(
            b"{\"QMP\": {}}\n{\"return\": {}}\n{\"event\": \"STOP\"}\n{\"return\": {}}\n\
              {\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n",
        )
        .unwrap();
        qmp.run("stop").unwrap();
        let error = qmp.run("cont").unwrap_err().to_string();
        assert_eq!(error, "QEMU refused \"cont\": no");
        let mut sent = [0; 256];
        let length = qemu.read(&mut sent).unwrap();
        let sent = std::str::from_utf8(&sent[..length]).unwrap();
        assert_eq!(
            sent,
            "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"stop\"}\n{\"execute\":\"cont\"}\n"
        );
    }

    #[test]
    fn the_reason_of_a_shutdown_is_found_among_events() {
        let (mut qmp, mut qemu) = client_and_qemu();
        qemu.write_all(
            b"{\"QMP\": {}}\n{\"event\": \"RESUME\"}\n\
              {\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\n",
        )
        .unwrap();
        drop(qemu);
        assert_eq!(qmp.shutdown_reason().as_deref(), Some("guest-reset"));
        assert_eq!(qmp.shutdown_reason(), None);
    }

    #[test]
    fn a_dead_qemu_is_an_error() {
        let (mut qmp, qemu) = client_and_qemu();
        drop(qemu);
        assert!(qmp.run("cont").is_err());
    }
}
