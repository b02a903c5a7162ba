//! `sandbox metrics`: prints them, or serves them over HTTP to whoever asks.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use sandbox_vmm_api::socket;

use super::{Error, Global, print};
use crate::log::Log;
use crate::metrics;

/// The most bytes of a request.
const MAX_REQUEST_BYTES: u64 = 8 << 10;

/// How long whoever asks may take to say it, and to take the answer.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(5));

/// Where an address is a unix socket.
const UNIX: &str = "unix:";

// The arguments of `sandbox metrics`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Serve them at /metrics until killed, on unix:PATH or ADDRESS:PORT
    #[arg(long, value_name = "WHERE")]
    listen: Option<String>,
}

/// Prints or serves the metrics of all sandboxes.
pub fn metrics(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    let Some(address) = &args.listen else {
        print(&text(global)?)?;
        return Ok(0);
    };
    let failed = |error| Error::Listen { address: address.clone(), error };
    match address.strip_prefix(UNIX) {
        Some(path) => {
            for stream in bind(Path::new(path)).map_err(failed)?.incoming().flatten() {
                let patient = stream.set_read_timeout(PATIENCE).and(stream.set_write_timeout(PATIENCE));
                note(patient.and_then(|()| serve(stream, global)), log);
            }
        }
        None => {
            for stream in TcpListener::bind(address).map_err(failed)?.incoming().flatten() {
                let patient = stream.set_read_timeout(PATIENCE).and(stream.set_write_timeout(PATIENCE));
                note(patient.and_then(|()| serve(stream, global)), log);
            }
        }
    }
    Ok(0)
}

fn text(global: &Global) -> Result<String, Error> {
    let place = global.place()?;
    Ok(metrics::of(&place.root, place.config.metrics.as_deref())?)
}

/// Listens on a unix socket, for its owner and its group. One that nobody listens on any more is in nobody's way.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if socket::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        fs::remove_file(path)?;
    }
    let listener = socket::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

fn note(served: io::Result<()>, log: &Log) {
    if let Err(error) = served {
        log.debug(&format!("metrics: {error}"));
    }
}

/// Answers one request.
fn serve(mut stream: impl Read + Write, global: &Global) -> io::Result<()> {
    let request = head(&mut stream)?;
    let (status, body) = match request.lines().next().unwrap_or_default().split(' ').collect::<Vec<_>>()[..] {
        ["GET", "/metrics", _] => match text(global) {
            Ok(text) => ("200 OK", text),
            Err(error) => ("500 Internal Server Error", format!("{error}\n")),
        },
        ["GET", ..] => ("404 Not Found", "they are at /metrics\n".into()),
        _ => ("400 Bad Request", "GET /metrics\n".into()),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// The request as far as the empty line.
fn head(stream: &mut impl Read) -> io::Result<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && (head.len() as u64) < MAX_REQUEST_BYTES {
        match stream.read(&mut byte)? {
            0 => break,
            _ => head.push(byte[0]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
