//! The command line of `sandbox`.
//!
//! Raw arguments are parsed here; each command has a file that resolves its own and carries it out.

mod check;
mod create;
mod events;
mod exec;
mod kill;
mod list;
mod machine;
mod metrics;
mod parse;
mod pause;
mod ps;
mod removal;
mod run;
mod security;
mod spec;
mod start;
mod state;
mod update;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use machine::absolute;

use crate::cgroup::Manager as CgroupManager;
use crate::client::{ClientError, ExecError};
use crate::config::{Config, ConfigError};
use crate::lifecycle::{self, Place};
use crate::log::{Format, Level, Log};
use crate::monitor::AskError;
use crate::spec::SpecError;
use crate::state::{OCI_VERSION, StateError, default_root};
use crate::{descriptor, exit, features};

/// Run OCI bundles, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "sandbox", disable_version_flag = true, subcommand_required = false, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What stands before a command.
#[derive(Debug, clap::Args)]
struct Options {
    #[command(flatten)]
    global: Global,
    /// Print the version and exit
    #[arg(long, short = 'v')]
    version: bool,
}

/// What every command takes.
#[derive(Clone, Debug, clap::Args)]
struct Global {
    /// Directory of the state of running sandboxes [default: /run/sandbox]
    #[arg(long, value_name = "DIR", global = true)]
    root: Option<PathBuf>,
    /// The operator's configuration [default: /etc/sandbox/config.toml, if there is one]
    #[arg(long, value_name = "FILE", global = true, env = "SANDBOX_CONFIG", hide_env = true)]
    config: Option<PathBuf>,
    /// Append messages to this file
    #[arg(long, value_name = "FILE", global = true)]
    log: Option<PathBuf>,
    /// Form of messages in the log
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    log_format: Format,
    /// Have systemd make the cgroups of sandboxes
    #[arg(long, global = true)]
    systemd_cgroup: bool,
    /// Who puts sandboxes into cgroups; `disabled`: nobody, they stay where they are started
    #[arg(long, global = true, hide = true, value_name = "MANAGER")]
    cgroup_manager: Option<CgroupManager>,
    /// Accepted for engines: the host's user namespaces play no part
    #[arg(long, global = true, hide = true, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    rootless: Option<String>,
    /// Show what is going on
    #[arg(long, global = true)]
    debug: bool,
}

impl Global {
    /// The state root. Who names it does without a configuration.
    fn root(&self) -> Result<PathBuf, Error> {
        match &self.root {
            Some(root) => Ok(absolute(root)),
            None => Ok(root_of(&self.config()?)),
        }
    }

    fn place(&self) -> Result<Place, Error> {
        let config = self.config()?;
        let root = self.root.as_deref().map_or_else(|| root_of(&config), absolute);
        let wanted = self.cgroup_manager.unwrap_or_default();
        let cgroups = if self.systemd_cgroup { CgroupManager::Systemd } else { wanted };
        Ok(Place { root, cgroups, debug: self.debug, config })
    }

    fn config(&self) -> Result<Config, Error> {
        Ok(Config::load(self.config.as_deref())?)
    }
}

fn root_of(config: &Config) -> PathBuf {
    config.root.clone().unwrap_or_else(default_root)
}

// The arguments of a command are put together only where it is the one that was given: that of all of them takes longer
// than most commands.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Run a bundle and wait for its end
    Run(Box<run::Args>),
    /// Say what this host offers and which machine would be used
    Check(check::Args),
    /// Write a config.json to start from
    Spec(spec::Args),
    /// List the sandboxes that run
    List(list::Args),
    /// Send a signal to a sandbox's process
    Kill(kill::Args),
    /// Make a sandbox whose process waits to be started
    Create(Box<create::Args>),
    /// Execute the process of a created sandbox
    Start(start::Args),
    /// Print the state of a sandbox
    State(state::Args),
    /// Remove a stopped sandbox
    Delete(removal::Args),
    /// Run one more process in a running sandbox
    Exec(Box<exec::Args>),
    /// List the processes of a sandbox
    Ps(ps::Args),
    /// Hold every process of a sandbox
    Pause(pause::Args),
    /// Let the processes of a paused sandbox go on
    Resume(pause::Args),
    /// Change the limits of a sandbox
    Update(Box<update::Args>),
    /// Print what a sandbox uses
    Events(events::Args),
    /// Print the metrics of all sandboxes, or serve them
    Metrics(metrics::Args),
    /// Say what this runtime can do, for engines
    Features,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Lifecycle(#[from] lifecycle::Error),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error("{0}")]
    Failed(String),
    #[error(transparent)]
    Check(#[from] check::CheckError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{0}")]
    Usage(String),
    #[error("cannot send the process to the pidfd socket {}: {error}", path.display())]
    PidfdSocket { path: PathBuf, error: std::io::Error },
    #[error("cannot write {}: {error}", path.display())]
    Write { path: PathBuf, error: std::io::Error },
    #[error("cannot serve on {address}: {error}")]
    Listen { address: String, error: std::io::Error },
    #[error("cannot print: {0}")]
    Print(std::io::Error),
}

/// Carries out a command line. Returns the exit code.
pub fn main(args: impl Iterator<Item = OsString>) -> u8 {
    let args: Vec<_> = args.collect();
    if let Some(code) = crate::hidden(&args) {
        return code;
    }
    descriptor::keep_from_children();
    let Cli { options: Options { global, version }, command } = match parse::parse(&args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match (error.use_stderr(), is_run(&args)) {
                (false, _) => 0,
                (true, true) => exit::SANDBOX_FAILED,
                (true, false) => exit::MISUNDERSTOOD,
            };
        }
    };
    let failed = match &command {
        Some(Command::Run(_)) => exit::SANDBOX_FAILED,
        Some(Command::Exec(_)) => exit::EXEC_FAILED,
        _ => exit::FAILED,
    };
    let least = if global.debug { Level::Debug } else { Level::Info };
    let log = match Log::open(global.log.as_deref(), global.log_format, least) {
        Ok(log) => log,
        Err(error) => {
            let path = global.log.unwrap_or_default();
            Log::plain().error(&format!("cannot open the log {}: {error}", path.display()));
            return failed;
        }
    };
    let outcome =
        if version { print(&self::version()).map(|()| 0) } else { carry_out(command, &global, &log) };
    match outcome {
        Ok(code) => code,
        // A reader that has seen enough.
        Err(Error::Print(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            log.error(&error.to_string());
            failed
        }
    }
}

fn carry_out(command: Option<Command>, global: &Global, log: &Log) -> Result<u8, Error> {
    match command {
        Some(Command::Run(args)) => run::run(&args, global, log),
        Some(Command::Check(args)) => check::check(&args, global),
        Some(Command::Spec(args)) => spec::spec(&args, global),
        Some(Command::List(args)) => list::list(&args, global, log),
        Some(Command::Kill(args)) => kill::kill(&args, global),
        Some(Command::Create(args)) => create::create(&args, global, log),
        Some(Command::Start(args)) => start::start(&args, global, log),
        Some(Command::State(args)) => state::state(&args, global),
        Some(Command::Delete(args)) => removal::delete(&args, global, log),
        Some(Command::Exec(args)) => exec::exec(&args, global, log),
        Some(Command::Ps(args)) => ps::ps(&args, global),
        Some(Command::Pause(args)) => pause::pause(&args, global),
        Some(Command::Resume(args)) => pause::resume(&args, global),
        Some(Command::Update(args)) => update::update(&args, global),
        Some(Command::Events(args)) => events::events(&args, global),
        Some(Command::Metrics(args)) => metrics::metrics(&args, global, log),
        Some(Command::Features) => {
            print(&format!("{:#}\n", features::features()))?;
            Ok(0)
        }
        None => Err(Error::Usage("no command given: `sandbox --help` lists them".into())),
    }
}

/// Whether a command line that was not understood was to run something: its exit code must not be taken for the
/// process's.
fn is_run(args: &[OsString]) -> bool {
    args.iter().skip(1).any(|arg| arg == "run")
}

/// Name, commit and OCI version, laid out as runc does, whose users parse it.
fn version() -> String {
    format!("sandbox version {}\ncommit: {}\nspec: {OCI_VERSION}\n", features::VERSION, features::COMMIT)
}

/// Prints to standard output; a reader that left is an error, not a panic.
fn print(text: &str) -> Result<(), Error> {
    use std::io::Write;
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::Print)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_dashes_is_the_command() {
        let cli = Cli::try_parse_from(["sandbox", "run", "bundle", "--", "ls", "-l", "--debug"]).unwrap();
        let Some(Command::Run(args)) = cli.command else { panic!("no run") };
        assert_eq!(args.command, ["ls", "-l", "--debug"]);
        assert!(!cli.options.global.debug);
        let cli = Cli::try_parse_from(["sandbox", "run", "--", "ls"]).unwrap();
        let Some(Command::Run(args)) = cli.command else { panic!("no run") };
        assert_eq!((args.target.to_str(), args.command), (Some("."), vec!["ls".to_owned()]));
    }
}
