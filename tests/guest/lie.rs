//! The probe as an agent that lies: it says its hello, answers the first request, and then what it is told to. Or as one
//! that dies: it does nothing of what it is asked, says that it has, and dies at one of the requests.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Outcome;
use crate::init::dial;

/// The host's ports, as the protocol has them.
const CONTROL_PORT: u32 = 1024;
const STREAM_PORT: u32 = 1025;

/// The version of the protocol.
const VERSION: u32 = 2;

/// Far more than any host listens to.
const FLOOD: usize = 100_000;
const CONNECTIONS: usize = 2000;

/// More connections than a host may forgive.
const CLAIMS: usize = 100;

/// Lies in one way; returns when the host has hung up.
pub fn tell(how: &str) -> Outcome {
    let mut control = greet().map_err(failed)?;
    let request = read(&mut control).map_err(failed)?;
    control.write_all(&done(&request)).map_err(failed)?;
    let told = match how {
        "giant" => control.write_all(&[0xff; 4]),
        "half" => control.write_all(&[100, 0, 0, 0, b'{']).and_then(|()| control_end(&control)),
        "nonsense" => control.write_all(b"\x02\0\0\0{}"),
        "unasked" => control.write_all(&frame(&json!({"kind": "reply", "id": 4711, "outcome": "done"}))),
        "nobody" => {
            let exited = json!({"kind": "event", "event": "exited", "container": "../../nobody", "status": {"code": 0}});
            (0..FLOOD).try_for_each(|_| control.write_all(&frame(&exited)))
        }
        "hello-again" => hello_again(&mut control),
        "reply-again" => control.write_all(&done(&request)),
        "stream-again" => stream_again(&mut control, &request["call"]["stream_secret"]),
        "streams" => {
            let secret = &request["call"]["stream_secret"];
            let hello =
                json!({"container": "../../nobody", "process": "", "stream": "stdout", "secret": secret});
            (0..CONNECTIONS).try_for_each(|_| dial(STREAM_PORT)?.write_all(&frame(&hello)))
        }
        _ => return Err(format!("no such lie: {how}")),
    };
    // The host may have hung up on the way, which is what is wanted.
    let _ = told;
    std::thread::sleep(Duration::from_secs(1000));
    Ok(())
}

/// Dials for control once more, which has to be in vain, and says the hello once more where it was said.
fn hello_again(control: &mut File) -> std::io::Result<()> {
    match greet().and_then(|mut second| second.read(&mut [0])) {
        Ok(read) if read > 0 => Err(ErrorKind::AlreadyExists.into()),
        _ => control.write_all(&frame(&hello())),
    }
}

/// Dials for the output of the container's process, writes a line, and claims it again and again with other lines.
fn stream_again(control: &mut File, secret: &Value) -> std::io::Result<()> {
    let request = serve(control, "create")?;
    let container = &request["call"]["container"];
    let hello = json!({"container": container, "process": "", "stream": "stdout", "secret": secret});
    let claim = |line: &str| {
        let mut connection = dial(STREAM_PORT)?;
        connection.write_all(&frame(&hello)).and_then(|()| connection.write_all(line.as_bytes()))?;
        Ok::<File, std::io::Error>(connection)
    };
    let first = claim("first\n")?;
    for _ in 0..CLAIMS {
        // One that is closed at once may not even take the line.
        let _ = claim("again\n").and_then(|mut again| again.read(&mut [0]));
    }
    drop(first);
    Ok(())
}

/// Answers requests up to the one with this verb.
pub fn serve_until(verb: &str) -> Outcome {
    let mut control = greet().map_err(failed)?;
    serve(&mut control, verb).map(drop).map_err(failed)
}

/// The same on a connection. Returns that request.
fn serve(control: &mut File, verb: &str) -> std::io::Result<Value> {
    loop {
        let request = read(control)?;
        if request["call"]["verb"] == verb {
            return Ok(request);
        }
        control.write_all(&done(&request))?;
    }
}

fn failed(error: std::io::Error) -> String {
    format!("control connection: {error}")
}

/// Dials, and says the hello.
fn greet() -> std::io::Result<File> {
    let mut control = dial(CONTROL_PORT)?;
    control.write_all(&frame(&hello()))?;
    Ok(control)
}

fn hello() -> Value {
    json!({"version": VERSION, "kernel": "6.12", "kernel_micros": 1, "agent_micros": 1})
}

/// The reply to a request that was carried out.
fn done(request: &Value) -> Vec<u8> {
    frame(&json!({"kind": "reply", "id": request["id"], "outcome": "done"}))
}

/// Sends nothing more, but listens.
fn control_end(control: &File) -> std::io::Result<()> {
    Ok(rustix::net::shutdown(control, rustix::net::Shutdown::Write)?)
}

fn frame(value: &Value) -> Vec<u8> {
    let text = value.to_string();
    [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn read(from: &mut File) -> std::io::Result<Value> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    from.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}
