//! The tests' program inside a guest: as a command in a container, and as `/init` of a bare guest.
//!
//! As a command, its first argument says what to do; see [`COMMANDS`]. As process 1 it takes its orders from
//! the kernel's command line and from the host; see [`init`].

mod files;
mod init;
mod lie;
mod memory;
mod net;
mod programs;
mod read_only;
mod streams;

use std::process::ExitCode;

/// How a command went: a failure is a sentence.
type Outcome = Result<(), String>;

/// A command: what it is called, the arguments it wants, and what it does.
type Command = (&'static str, &'static str, fn(&[String]) -> Outcome);

const COMMANDS: [Command; 13] = [
    ("files", "DIRECTORY: every file semantic that programs lean on", files::check),
    ("make", "FILE MODE: makes a file with this mode, in octal", files::make),
    ("hold", "DIRECTORY: opens its files, without letting go of one, until that fails", files::hold),
    ("read-only", "DIRECTORY: every kind of write is refused", read_only::check),
    ("pattern", "BYTES: writes that many bytes of a fixed pseudo-random sequence", streams::pattern),
    ("checksum", "reads standard input and prints its length and checksum", streams::checksum),
    ("stream-hellos", "JSON: claims a stream of its sandbox from the host, many times", streams::claim),
    ("connections", "ADDRESS COUNT: that many exchanges with an echo service", net::connections),
    ("serve", "ADDRESS: echoes what comes over every connection to it", net::serve),
    ("offloads", "prints what eth0 does for the network stack", net::offloads),
    ("allocate", "MIB: takes that much memory and touches every page of it", memory::allocate),
    ("run32", "runs a 32-bit program that exits with 42", programs::run_32_bit),
    ("syscall", "NUMBER: makes a system call without arguments and prints errno", programs::system_call),
];

fn main() -> ExitCode {
    // The kernel may have arguments for it; a container's process 1 has another name.
    if std::process::id() == 1 && std::env::args().next().is_some_and(|name| name == "/init") {
        init::run();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = arguments.split_first() else { return usage() };
    let Some((_, _, command)) = COMMANDS.iter().find(|c| c.0 == name) else { return usage() };
    match command(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("probe {name}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    for (name, what, _) in COMMANDS {
        eprintln!("probe {name} {what}");
    }
    ExitCode::from(2)
}

/// The argument at `index` as a number.
fn number(arguments: &[String], index: usize) -> Result<usize, String> {
    let text = arguments.get(index).ok_or("a number is missing")?;
    text.parse().map_err(|e| format!("{text}: {e}"))
}
