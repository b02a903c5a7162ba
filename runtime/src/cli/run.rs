//! `sandbox run`.

use std::path::{Path, PathBuf};

use sandbox_protocol::RootWrites;
use sandbox_vmm_api::{MachineChoice, MachineKind};

use super::create::{self, Engine};
use super::machine::MachineOptions;
use super::{Error, Global};
use crate::lifecycle::{self, Wanted};
use crate::log::Log;
use crate::quantity::{Cpus, Size, Span};
use crate::sandbox::Ending;
use crate::spec::Overrides;
use crate::state::SandboxId;
use crate::timings::{Moment, Timeline};
use crate::{client, exit};

const OUT_OF_MEMORY: &str =
    "the container reached its memory limit and a process in it was killed: --memory SIZE gives more";

// The arguments of `sandbox run`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The bundle: a directory with config.json and a root file system; the id, where --bundle gives the bundle
    #[arg(value_name = "BUNDLE", default_value = ".")]
    pub target: PathBuf,
    /// Run this instead of the configuration's command
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    /// Name of the sandbox [default: a random one]
    #[arg(long)]
    id: Option<SandboxId>,
    /// Stop the sandbox when its process has run this long, with exit code 124
    #[arg(long, value_name = "DURATION", conflicts_with = "detach")]
    timeout: Option<Span>,
    /// Memory limit, such as 512M
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<Size>,
    /// CPU limit, such as 2 or 0.5
    #[arg(long, value_name = "N")]
    cpus: Option<Cpus>,
    /// Set an environment variable; a NAME alone takes its value from here
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Run as this user of the container
    #[arg(long, short, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Run in this directory of the container
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Host name of the container
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Let writes to the root file system go through to the bundle; without it they vanish
    #[arg(long)]
    persist: bool,
    /// Leave the sandbox running in the background, until it is deleted
    #[arg(long, short)]
    detach: bool,
    /// The bundle; the first argument is then the id, as engines write it
    #[arg(long, short, value_name = "DIR")]
    bundle: Option<PathBuf>,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    engine: Engine,
    /// Print where the time went
    #[arg(long)]
    timings: bool,
    /// Do not say which machine was chosen
    #[arg(long, short)]
    quiet: bool,
}

/// Runs a bundle. Returns the exit code.
pub fn run(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    let mut timeline = Timeline::from(Moment::now());
    let (bundle, id) = args.bundle_and_id()?;
    let wanted = Wanted {
        id,
        bundle,
        overrides: args.overrides(),
        writes: if args.persist { RootWrites::Through } else { RootWrites::Overlay },
        machine: args.machine.wanted(),
        timeout: args.timeout.map(|span| span.0),
        detached: args.detach,
        console: args.engine.console(),
    };
    let place = global.place()?;
    let is_auto = wanted.machine.choice.unwrap_or(place.config.machine.choice) == MachineChoice::Auto;
    let plan = lifecycle::plan(wanted, &place, log)?;
    timeline.mark("read bundle");
    let mut on_machine = |kind: MachineKind, reason: &str| {
        let choice = format!("machine: {}: {reason}", kind.name());
        match is_auto && !args.quiet {
            true => log.info(&choice),
            false => log.debug(&choice),
        }
    };
    if args.detach {
        create::carry_out(&plan, &args.engine, &mut on_machine)?;
        let failed = lifecycle::start(&plan.container.id, &plan.container.root)?;
        failed.iter().for_each(|failed| log.warn(failed));
        return Ok(0);
    }
    args.engine.check()?;
    args.engine.introduce(std::process::id())?;
    let (ending, rest) = client::run(&plan, &mut on_machine)?;
    timeline.append(rest);
    timeline.mark("end monitor");
    match &ending {
        Ending::Failed { message, .. } => log.error(message),
        Ending::Exited { out_of_memory: true, .. } => log.info(OUT_OF_MEMORY),
        Ending::Exited { .. } => {}
    }
    if args.timings {
        eprint!("{}", timeline.table());
    }
    Ok(exit::code_of(&ending))
}

impl Args {
    /// `run BUNDLE`, or as engines write it, `run --bundle BUNDLE ID`.
    fn bundle_and_id(&self) -> Result<(&Path, SandboxId), Error> {
        let Some(bundle) = &self.bundle else {
            return Ok((&self.target, self.id.clone().unwrap_or_else(SandboxId::random)));
        };
        let id = match (&self.id, self.target.to_str()) {
            (Some(id), _) => id.clone(),
            (None, Some(".") | None) => SandboxId::random(),
            (None, Some(id)) => id.parse().map_err(|e| Error::Usage(format!("{e}")))?,
        };
        Ok((bundle, id))
    }

    fn overrides(&self) -> Overrides {
        Overrides {
            args: self.command.clone(),
            env: self.env.clone(),
            cwd: self.workdir.clone(),
            user: self.user.clone(),
            hostname: self.hostname.clone(),
            memory: self.memory,
            cpus: self.cpus,
            binds: Vec::new(),
        }
    }
}
