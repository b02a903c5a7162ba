//! `sandbox-vmm`: runs one virtual machine.
//!
//! Started by the sandbox runtime; see the crate `sandbox-vmm-api` for what the two say to each other.

use std::io::Write as _;
use std::process::ExitCode;

use sandbox_vmm::events::EventSocket;
use sandbox_vmm::{log, probe, process, session};
use sandbox_vmm_api::VmEvent;

const USAGE: &str = "usage: sandbox-vmm            run the machine that standard input describes
       sandbox-vmm probe      say as JSON which machines this host can run
       sandbox-vmm --version  print the version";

/// The exit code for arguments that make no sense.
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => run(),
        [word] if word == "probe" => print_probe(),
        [word] if word == "--version" => print(concat!("sandbox-vmm ", env!("CARGO_PKG_VERSION"))),
        [word] if word == "--help" => print(USAGE),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(USAGE_ERROR)
        }
    }
}

/// Runs a machine. However it ends, the runtime is told, and that is a success of this program.
fn run() -> ExitCode {
    log::start();
    let events = match EventSocket::inherited() {
        Ok(events) => events,
        Err(error) => return fail(&error.to_string()),
    };
    if let Err(error) = process::settle() {
        return fail(&format!("cannot set the process up: {error}"));
    }
    let reason = session::run(&events);
    events.send(&VmEvent::Exited { reason });
    ExitCode::SUCCESS
}

fn print_probe() -> ExitCode {
    match serde_json::to_string_pretty(&probe::probe()) {
        Ok(text) => print(&text),
        Err(error) => fail(&error.to_string()),
    }
}

fn print(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("sandbox-vmm: {message}");
    ExitCode::FAILURE
}
