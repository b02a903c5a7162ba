//! `sandbox create`.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use sandbox_protocol::RootWrites;
use sandbox_vmm_api::{MachineKind, socket};

use super::machine::{MachineOptions, absolute};
use super::{Error, Global};
use crate::lifecycle::{self, Console, Wanted};
use crate::log::Log;
use crate::replace::replace;
use crate::sandbox::Plan;
use crate::spec::Overrides;
use crate::state::SandboxId;
use crate::{descriptor, process};

// The arguments of `sandbox create`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Name of the sandbox
    id: SandboxId,
    /// The bundle: a directory with config.json and a root file system
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    #[command(flatten)]
    engine: Engine,
    #[command(flatten)]
    machine: MachineOptions,
}

// The options that engines give, as runc has them.
#[derive(Clone, Debug, clap::Args)]
pub struct Engine {
    /// Write the process id of the sandbox to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Send the master of the process's terminal to this socket
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Send a descriptor of the process that stands for the sandbox to this socket
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Accepted for engines: the guest always pivots
    #[arg(long, hide = true)]
    no_pivot: bool,
    /// Accepted for engines: the guest's keyrings are its own
    #[arg(long, hide = true)]
    no_new_keyring: bool,
    /// Descriptors to pass on: none can be, into a virtual machine
    #[arg(long, hide = true, default_value_t = 0)]
    preserve_fds: u32,
}

/// Makes a sandbox, whose process waits to be started.
pub fn create(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    let wanted = Wanted {
        id: args.id.clone(),
        bundle: &args.bundle,
        overrides: Overrides::default(),
        // As other runtimes do: engines look at what was written there.
        writes: RootWrites::Through,
        machine: args.machine.wanted(),
        timeout: None,
        detached: true,
        console: args.engine.console(),
    };
    let plan = lifecycle::plan(wanted, &global.place()?, log)?;
    let mut on_machine =
        |kind: MachineKind, reason: &str| log.debug(&format!("machine: {}: {reason}", kind.name()));
    carry_out(&plan, &args.engine, &mut on_machine)?;
    Ok(0)
}

/// Carries a plan out, as far as the start of its process.
pub fn carry_out(
    plan: &Plan,
    engine: &Engine,
    on_machine: &mut dyn FnMut(MachineKind, &str),
) -> Result<(), Error> {
    engine.check()?;
    let stand_in = lifecycle::create(plan, None, on_machine)?;
    engine.introduce(stand_in.id()).inspect_err(|_| {
        // A sandbox that nobody can find is of no use.
        let _ = lifecycle::delete_by_force(&plan.container.id, &plan.container.root);
    })
}

impl Engine {
    /// Checks what cannot be done.
    pub fn check(&self) -> Result<(), Error> {
        match self.preserve_fds {
            0 => Ok(()),
            _ => Err(Error::Usage(
                "--preserve-fds: a descriptor of the host cannot be passed into a virtual machine: leave it out"
                    .into(),
            )),
        }
    }

    /// What is at the other end of the process's terminal.
    pub fn console(&self) -> Console {
        self.console_socket.as_deref().map_or(Console::Attended, |socket| Console::Socket(absolute(socket)))
    }

    /// Tells the engine who the process is.
    pub fn introduce(&self, pid: u32) -> Result<(), Error> {
        if let Some(path) = &self.pidfd_socket {
            send_pidfd(pid, path).map_err(|error| Error::PidfdSocket { path: path.clone(), error })?;
        }
        self.write_pid(pid)
    }

    /// Writes the process id, so that a reader sees all of it or nothing.
    fn write_pid(&self, pid: u32) -> Result<(), Error> {
        let Some(path) = &self.pid_file else { return Ok(()) };
        let error = |error| Error::Write { path: path.clone(), error };
        let directory = path.parent().unwrap_or(Path::new("."));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let new = directory.join(format!(".{name}.new"));
        replace(path, &new, pid.to_string().as_bytes()).map_err(error)
    }
}

fn send_pidfd(pid: u32, socket: &Path) -> io::Result<()> {
    let pidfd = process::pidfd(pid)?;
    descriptor::send(&socket::connect(&absolute(socket))?, b"pidfd", &[pidfd.as_fd()])
}
