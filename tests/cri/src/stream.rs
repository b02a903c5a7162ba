//! What goes over a connection instead of an answer: exec, attach and port-forward.
//!
//! The connection is a WebSocket. Each message begins with a byte that says which of several channels it is of.

use std::error::Error;
use std::io::Write;
use std::net::TcpStream;

use tungstenite::stream::MaybeTlsStream;
use tungstenite::{ClientRequestBuilder, Message, WebSocket};

/// The protocol of channels, and how a process ended as JSON.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// The channels of a process.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// Those of a port, and how many bytes of its number each begins with.
const DATA: u8 = 0;
const PORT_BYTES: usize = 2;

type Socket = WebSocket<MaybeTlsStream<TcpStream>>;

fn open(url: &str) -> Result<Socket, Box<dyn Error>> {
    let url = url.replacen("http://", "ws://", 1);
    let request = ClientRequestBuilder::new(url.parse()?).with_sub_protocol(PROTOCOL);
    Ok(tungstenite::connect(request)?.0)
}

fn send(socket: &mut Socket, channel: u8, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    Ok(socket.send(Message::binary([&[channel], bytes].concat()))?)
}

/// The next message, with its channel. `None`: there is none any more.
fn receive(socket: &mut Socket) -> Result<Option<(u8, Vec<u8>)>, Box<dyn Error>> {
    loop {
        match socket.read() {
            Ok(Message::Binary(bytes)) => {
                let (channel, rest) = bytes.split_first().ok_or("a message without a channel")?;
                return Ok(Some((*channel, rest.to_vec())));
            }
            Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => return Ok(None),
            Ok(_) => {}
            // A server may leave without a word.
            Err(tungstenite::Error::Protocol(_) | tungstenite::Error::Io(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes to a process, and prints what it writes: until it has ended, or has written this. Returns the exit code. Its
/// terminal, where it has one, is made as large as this.
pub fn converse(
    url: &str,
    size: Option<&str>,
    input: &str,
    until: Option<&str>,
) -> Result<u8, Box<dyn Error>> {
    let mut socket = open(url)?;
    if let Some(size) = size {
        let (width, height) = size.split_once('x').ok_or("a size is COLUMNSxROWS")?;
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}");
        send(&mut socket, RESIZE, size.as_bytes())?;
    }
    send(&mut socket, STDIN, input.as_bytes())?;
    let mut seen = String::new();
    while let Some((channel, bytes)) = receive(&mut socket)? {
        match channel {
            STDOUT => {
                std::io::stdout().write_all(&bytes)?;
                seen.push_str(&String::from_utf8_lossy(&bytes));
            }
            STDERR => std::io::stderr().write_all(&bytes)?,
            STATUS if !bytes.is_empty() => return exit_code(&serde_json::from_slice(&bytes)?),
            _ => {}
        }
        if until.is_some_and(|until| seen.contains(until)) {
            return Ok(0);
        }
    }
    Err("the connection ended first".into())
}

fn exit_code(status: &serde_json::Value) -> Result<u8, Box<dyn Error>> {
    if status["status"] == "Success" {
        return Ok(0);
    }
    let code = status["details"]["causes"][0]["message"].as_str().and_then(|code| code.parse().ok());
    code.ok_or_else(|| format!("it failed: {status}").into())
}

/// Writes to a port, and prints what comes back until there is no more.
pub fn forward(url: &str, port: &str, input: &str) -> Result<(), Box<dyn Error>> {
    let mut socket = open(&format!("{url}?port={port}"))?;
    send(&mut socket, DATA, input.as_bytes())?;
    let mut begun = [false; 2];
    while let Some((channel, bytes)) = receive(&mut socket)? {
        let begun = begun.get_mut(usize::from(channel)).ok_or("an unknown channel")?;
        // The first message of each has the number of the port.
        let rest = if *begun { &bytes[..] } else { bytes.get(PORT_BYTES..).ok_or("no number of a port")? };
        *begun = true;
        match channel {
            DATA => std::io::stdout().write_all(rest)?,
            _ if !rest.is_empty() => return Err(String::from_utf8_lossy(rest).into()),
            _ => {}
        }
    }
    Ok(())
}
