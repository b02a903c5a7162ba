//! Bulk output and input that can be checked.

use std::io::{self, Read, Write};

use sandbox_tests::pattern;

use crate::{Outcome, number};

/// Writes a fixed pseudo-random sequence to standard output.
pub fn pattern(arguments: &[String]) -> Outcome {
    let bytes = number(arguments, 0)?;
    pattern::write(&mut io::stdout().lock(), bytes).map_err(|e| format!("standard output: {e}"))
}

/// Prints length and checksum of standard input.
pub fn checksum(_: &[String]) -> Outcome {
    let sum = pattern::checksum(&mut io::stdin().lock()).map_err(|e| format!("standard input: {e}"))?;
    println!("{sum}");
    Ok(())
}

/// Where the host waits for the streams of processes.
const HOST_CID: u32 = 2;
const STREAM_PORT: u32 = 1025;

/// How often a stream is claimed: more often than the host would forgive its agent.
const CLAIMS: usize = 100;

/// Sends a frame to the port where the agent dials for streams, again and again, and says how often the host answered
/// otherwise than by closing the connection.
pub fn claim(arguments: &[String]) -> Outcome {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
    use std::os::fd::AsRawFd;
    let json = arguments.first().ok_or("a frame is missing")?.as_bytes();
    let frame = [&u32::try_from(json.len()).unwrap_or_default().to_le_bytes(), json].concat();
    let mut taken = 0;
    for _ in 0..CLAIMS {
        let dialled = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let dialled = dialled.map_err(|e| format!("socket: {e}"))?;
        connect(dialled.as_raw_fd(), &VsockAddr::new(HOST_CID, STREAM_PORT))
            .map_err(|e| format!("connect: {e}"))?;
        let mut connection = std::fs::File::from(dialled);
        connection.write_all(&frame).map_err(|e| format!("send: {e}"))?;
        taken += usize::from(connection.read(&mut [0]).is_ok_and(|read| read > 0));
    }
    println!("{taken} of {CLAIMS} taken");
    Ok(())
}
