//! Asking a machine's process something while it runs, by its control socket.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use sandbox_vmm_api::{ControlReply, ControlRequest, socket};

use crate::descriptor;

/// The most bytes of an answer.
const MAX_ANSWER_BYTES: u64 = 256 << 10;

/// Asks the machine that listens on a socket, and waits for its answer. An error is also what it could not do.
pub fn ask(
    path: &Path,
    request: ControlRequest,
    descriptor: Option<BorrowedFd<'_>>,
    time: Duration,
) -> io::Result<ControlReply> {
    let stream = socket::connect(path)?;
    stream.set_read_timeout(Some(time))?;
    stream.set_write_timeout(Some(time))?;
    let mut line = serde_json::to_vec(&request)?;
    line.push(b'\n');
    descriptor::send(&stream, &line, descriptor.as_slice())?;
    let mut answer = Vec::new();
    BufReader::new(stream).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut answer)?;
    match serde_json::from_slice(&answer)? {
        ControlReply::Error { message } => Err(io::Error::other(message)),
        reply => Ok(reply),
    }
}
