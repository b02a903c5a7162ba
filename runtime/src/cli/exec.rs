//! `sandbox exec`.

use std::path::PathBuf;

use oci_spec::runtime::{Capabilities, Capability, Process, User};

use super::create::Engine;
use super::machine::absolute;
use super::{Error, Global};
use crate::client::{self, ExecPlan};
use crate::log::Log;
use crate::monitor;
use crate::spec::{Overrides, check_process, process_from, process_of};
use crate::state::{SandboxId, Status, find};

// The arguments of `sandbox exec`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// What to run in it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
    /// Take the process from this file, in the form of `process` in config.json
    #[arg(long, short, value_name = "FILE", conflicts_with = "command")]
    process: Option<PathBuf>,
    /// Leave the process running in the background
    #[arg(long, short)]
    detach: bool,
    /// Give the process a terminal
    #[arg(long, short)]
    tty: bool,
    /// Run as this user
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Run in this directory of the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Set an environment variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Add a capability
    #[arg(long, short, value_name = "CAP", value_parser = parse_capability)]
    cap: Vec<Capability>,
    /// Add a group
    #[arg(long, short = 'g', value_name = "GID")]
    additional_gids: Vec<u32>,
    /// Keep the process from gaining privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Accepted for engines: profiles are the host kernel's
    #[arg(long, hide = true, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Accepted for engines: labels are the host kernel's
    #[arg(long, hide = true, value_name = "LABEL")]
    process_label: Option<String>,
    #[command(flatten)]
    engine: Engine,
}

/// Runs one more process in a running sandbox. Returns its exit code, or 0 for a detached one.
pub fn exec(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    args.engine.check()?;
    let (directory, record) = find(&global.root()?, &args.id)?;
    match record.status {
        Status::Running => {}
        Status::Stopped => return Err(Error::Failed("cannot exec in a stopped container".into())),
        Status::Paused => {
            return Err(Error::Failed("cannot exec in a paused container: resume it first".into()));
        }
        status => {
            let why = format!("cannot exec in a container that is {}: container not running", status.name());
            return Err(Error::Failed(why));
        }
    }
    let process = match &args.process {
        Some(file) => {
            let (process, warnings) = process_from(file)?;
            warnings.iter().for_each(|warning| log.warn(warning));
            process
        }
        None => args.changed(process_of(&record.bundle)?)?,
    };
    let plan = ExecPlan {
        socket: monitor::socket_of(&directory),
        process,
        console_socket: args.engine.console_socket.as_deref().map(absolute),
    };
    if args.detach {
        let mut holder = client::detached(&plan)?;
        args.engine.introduce(holder.id()).inspect_err(|_| {
            // A process that nobody can find is of no use; it goes with its holder.
            let _ = holder.kill().and_then(|()| holder.wait());
        })?;
        return Ok(0);
    }
    let started =
        || args.engine.introduce(std::process::id()).map_err(|e| client::ExecError::Holder(e.to_string()));
    Ok(client::attached(&plan, started)?.shell_code())
}

impl Args {
    /// The container's own process, changed by the command line.
    fn changed(&self, mut process: Process) -> Result<Process, Error> {
        process.set_terminal(Some(self.tty));
        process.set_args(Some(self.command.clone()));
        let overrides = Overrides { env: self.env.clone(), cwd: self.cwd.clone(), ..Overrides::default() };
        overrides.apply_to_process(&mut process)?;
        if let Some(user) = &self.user {
            process.set_user(parse_user(user)?);
        }
        let mut groups = process.user().additional_gids().clone().unwrap_or_default();
        groups.extend(&self.additional_gids);
        process.user_mut().set_additional_gids(Some(groups));
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        if !self.cap.is_empty() {
            add_capabilities(&mut process, &self.cap);
        }
        check_process(&process)?;
        Ok(process)
    }
}

fn parse_capability(text: &str) -> Result<Capability, String> {
    let name = text.to_uppercase();
    let name = name.strip_prefix("CAP_").unwrap_or(&name);
    name.parse().map_err(|_| "it is not the name of a capability, such as CAP_NET_RAW".into())
}

fn parse_user(text: &str) -> Result<User, Error> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    let number = |text: &str| text.parse::<u32>().ok();
    let (Some(uid), Some(gid)) = (number(uid), number(gid)) else {
        return Err(Error::Usage(format!("--user: `{text}` is not UID or UID:GID")));
    };
    let mut user = User::default();
    user.set_uid(uid).set_gid(gid);
    Ok(user)
}

/// Adds to all sets but the ambient and the inheritable one, as runc does.
fn add_capabilities(process: &mut Process, added: &[Capability]) {
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(added);
        Some(set)
    };
    let (bounding, effective, permitted) =
        (with(sets.bounding()), with(sets.effective()), with(sets.permitted()));
    sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    process.set_capabilities(Some(sets));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_their_prefix_or_not() {
        for good in ["CAP_SYS_ADMIN", "SYS_ADMIN", "cap_sys_admin"] {
            assert_eq!(parse_capability(good), Ok(Capability::SysAdmin), "{good}");
        }
        for bad in ["", "CAP_", "CAP_FROB"] {
            assert!(parse_capability(bad).is_err(), "{bad}");
        }
    }
}
