//! The program `containerd-shim-sandbox-v2`: what containerd starts for the runtime class
//! `io.containerd.sandbox.v2`.
//!
//! containerd starts it with an action. [`start`] starts the shim proper, one for each pod, which [`serve`]s
//! containerd's task service on a socket until its last container is gone; [`delete`] removes what a shim that died has
//! left; [`info`] says what the runtime can do.
//!
//! ```text
//!  containerd ──start──► shim start ──listening socket──► shim serve ──┬─► stand-in ─► monitor ─► sandbox-vmm
//!      │  ▲                                                │   ▲       └─► …
//!      │  └──────────────────── events ────────────────────┘   │
//!      └─────────────────── requests of the task service ──────┘
//! ```
//!
//! Sandboxes are made and asked by the same functions as those of the command line, [`sandbox_runtime::lifecycle`];
//! the processes that own them are this program as well, started with the hidden subcommands of the library.
//!
//! | module | what it does |
//! |---|---|
//! | [`flags`] | the command line, as Go programs write it |
//! | [`place`] | where the state of a namespace's containers is, and the shims' sockets |
//! | [`service`] | the task service: requests to calls, errors to codes |
//! | [`sandbox`] | the sandbox API: a pod that containerd makes no first container for |
//! | [`pod`], [`carrier`], [`pause`] | what containerd says of such a pod, its first container, and what runs in it |
//! | [`container`] | a container: its processes, its root file system |
//! | [`process`] | a process: its state, its end, whoever waits for it |
//! | [`stdio`] | where the streams of a process go: fifos, files, programs that log |
//! | [`mounts`] | the mounts of a root file system |
//! | [`events`] | what happened, told to containerd in order |
//! | [`stats`] | what a container uses, in containerd's words |
//! | [`over`] | when there is nothing left to do, and every answer is out |
//! | [`log`] | the shim's own messages, which containerd reads |

mod carrier;
mod container;
mod delete;
mod error;
mod events;
mod flags;
mod info;
mod log;
mod logger;
mod mounts;
mod options;
mod over;
mod pause;
mod place;
mod pod;
mod process;
mod sandbox;
mod serve;
mod service;
mod start;
mod stats;
mod stdio;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use flags::{Action, Flags};

/// The runtime type that containerd knows this program by.
const RUNTIME: &str = "io.containerd.sandbox.v2";

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|word| word == pause::SUBCOMMAND) {
        return ExitCode::from(pause::main());
    }
    if let Some(code) = sandbox_runtime::hidden(&args) {
        return ExitCode::from(code);
    }
    match run(&args) {
        Ok(answer) => match std::io::stdout().write_all(&answer) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            // containerd shows what a shim says there.
            eprintln!("{RUNTIME}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Carries out an action. Returns what containerd reads on standard output.
fn run(args: &[OsString]) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let flags = Flags::parse(args.get(1..).unwrap_or_default())?;
    if flags.action != Action::Serve {
        sandbox_runtime::descriptor::keep_from_children();
    }
    match flags.action {
        Action::Version => Ok(info::version().into_bytes()),
        Action::Info => Ok(info::info()?),
        Action::Start => Ok(start::start(&flags)?),
        Action::Delete => Ok(delete::delete(&flags)?),
        Action::Remove => Ok(delete::remove(&flags)?),
        Action::Serve => serve::serve(&flags).map(|()| Vec::new()).map_err(Into::into),
    }
}
