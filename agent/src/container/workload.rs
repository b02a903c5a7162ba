//! The last steps of every process, first of its container or not: from the agent's rights to its own.
//!
//! The order is runc's. The root is the container's already.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use oci_spec::runtime::{Linux, Process};
use rustix::fs::{FileType, Mode, Uid, fchown, fstat};
use rustix::thread::Gid;

use super::capabilities::Sets;
use super::channel;
use super::command::{self, CommandError, Strings};
use super::filter_program::Program;
use super::hooks::{self, StartHooks};
use super::setup::SetupError;
use super::terminal::Terminal;
use super::user::{Accounts, User};
use super::{rlimits, scheduling, seccomp};
use crate::stdio::ChildStdio;

/// The mode that files are made without where the configuration has none.
const DEFAULT_UMASK: u32 = 0o022;

/// A process that is about to execute its program.
#[derive(Debug)]
pub struct Workload<'a> {
    /// Its configuration.
    pub process: &'a Process,
    /// What its container has of Linux: the personality.
    pub linux: Option<&'a Linux>,
    /// The container's filter of system calls.
    pub filter: Option<&'a Program>,
    /// A user to look up in the container, instead of the configured one.
    pub user: Option<&'a str>,
    /// Its terminal.
    pub terminal: Option<Terminal>,
    /// Whether it waits for the word before it executes its program.
    pub held: bool,
    /// What is to be run before its program.
    pub hooks: Option<StartHooks<'a>>,
}

impl Workload<'_> {
    /// Takes the streams, the user and the rights of the workload, waits for the word if it is held, and executes it.
    ///
    /// It returns only where something fails.
    pub fn run(self, channel: &OwnedFd, stdio: &ChildStdio) -> SetupError {
        match self.prepare(stdio) {
            Ok(ready) => match self.wait(channel) {
                Ok(()) => ready.execute(self.hooks.as_ref()),
                Err(e) => e,
            },
            Err(e) => e,
        }
    }

    fn prepare(&self, stdio: &ChildStdio) -> Result<Ready<'_>, SetupError> {
        let (user, environment) = self.user_and_environment()?;
        self.take_streams(stdio, &user)?;
        rlimits::set(self.process.rlimits().as_deref().unwrap_or_default())?;
        scheduling::take_personality(self.linux)?;
        let filter = self.restrict()?;
        self.become_user(&user)?;
        self.ready(environment, filter)
    }

    fn wait(&self, channel: &OwnedFd) -> Result<(), SetupError> {
        if !self.held {
            return Ok(());
        }
        let master = self.terminal.as_ref().map(|terminal| terminal.master.as_raw_fd());
        channel::ready_and_wait(channel, master).map_err(SetupError::step("wait for the start"))
    }

    /// The container's files are read only where they are needed: each is a round trip or two to the host.
    fn user_and_environment(&self) -> Result<(User, Vec<String>), SetupError> {
        let mut environment = self.process.env().clone().unwrap_or_default();
        let has_home = variable(&environment, "HOME").is_some_and(|home| !home.is_empty());
        if has_home && self.user.is_none() {
            return Ok((User::by_number(self.process.user()), environment));
        }
        let accounts = Accounts::read();
        let user = self.user(&accounts)?;
        if !has_home {
            environment.retain(|line| !line.starts_with("HOME="));
            environment.push(format!("HOME={}", accounts.home(user.uid)));
        }
        Ok((user, environment))
    }

    fn user(&self, accounts: &Accounts) -> Result<User, SetupError> {
        let configured = User::by_number(self.process.user());
        let Some(name) = self.user else { return Ok(configured) };
        let mut user = accounts.by_name(name)?;
        for group in configured.groups {
            if !user.groups.contains(&group) {
                user.groups.push(group);
            }
        }
        Ok(user)
    }

    /// The user must be able to open its own streams again, by way of `/dev/stdout` for one.
    fn take_streams(&self, stdio: &ChildStdio, user: &User) -> Result<(), SetupError> {
        if let Some(terminal) = &self.terminal {
            terminal.take()?;
        }
        let step = || SetupError::step::<rustix::io::Errno>("take the standard streams");
        if let ChildStdio::Files([stdin, stdout, stderr]) = stdio {
            rustix::stdio::dup2_stdin(stdin).map_err(step())?;
            rustix::stdio::dup2_stdout(stdout).map_err(step())?;
            rustix::stdio::dup2_stderr(stderr).map_err(step())?;
        }
        for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
            give(stream, Uid::from_raw(user.uid), None)
                .map_err(SetupError::step_of(|| format!("give the standard streams to user {}", user.uid)))?;
        }
        Ok(())
    }

    /// Without `no_new_privs` a filter can be loaded only by the privileged, so that is done now; with it, it
    /// waits for the last moment, so that the filter need not allow what happens until then.
    fn restrict(&self) -> Result<Option<&Program>, SetupError> {
        if self.process.no_new_privileges().unwrap_or(false) {
            rustix::thread::set_no_new_privs(true).map_err(SetupError::step("set no_new_privs"))?;
            return Ok(self.filter);
        }
        if let Some(filter) = self.filter {
            seccomp::load(filter)?;
        }
        Ok(None)
    }

    fn become_user(&self, user: &User) -> Result<(), SetupError> {
        let capabilities = Sets::of(self.process.capabilities().as_ref());
        capabilities.before_user()?;
        let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        rustix::thread::set_thread_groups(&groups).map_err(SetupError::step("set the additional groups"))?;
        let gid = Gid::from_raw(user.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .map_err(SetupError::step_of(|| format!("become group {}", user.gid)))?;
        // A directory may be open to the agent and closed to the user, or the other way about.
        let early = self.change_directory();
        let uid = Uid::from_raw(user.uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .map_err(SetupError::step_of(|| format!("become user {}", user.uid)))?;
        if early.is_err() {
            let directory = self.process.cwd().display();
            self.change_directory()
                .map_err(SetupError::step_of(|| format!("change to process.cwd, {directory}")))?;
        }
        capabilities.after_user()?;
        let umask = self.process.user().umask().unwrap_or(DEFAULT_UMASK);
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        Ok(())
    }

    /// Changes to the working directory, which must be inside the root.
    fn change_directory(&self) -> rustix::io::Result<()> {
        rustix::process::chdir(self.process.cwd())?;
        rustix::process::getcwd(Vec::new()).map(drop)
    }

    fn ready<'a>(
        &self,
        environment: Vec<String>,
        filter: Option<&'a Program>,
    ) -> Result<Ready<'a>, SetupError> {
        let arguments = self.process.args().as_deref().unwrap_or_default();
        let command = arguments.first().ok_or(CommandError::Empty)?;
        Ok(Ready {
            path: command::find(command, variable(&environment, "PATH"))?,
            arguments: Strings::new(arguments, "process.args")?,
            environment: Strings::new(&environment, "process.env")?,
            filter,
        })
    }
}

/// What is left to do.
struct Ready<'a> {
    path: PathBuf,
    arguments: Strings,
    environment: Strings,
    filter: Option<&'a Program>,
}

impl Ready<'_> {
    fn execute(self, hooks: Option<&StartHooks<'_>>) -> SetupError {
        if let Some(hooks) = hooks {
            let done = hooks.run();
            hooks::reap_orphans();
            if let Err(e) = done {
                return e.into();
            }
        }
        if let Some(filter) = self.filter
            && let Err(e) = seccomp::load(filter)
        {
            return e.into();
        }
        command::execute(&self.path, &self.arguments, &self.environment).into()
    }
}

/// Gives a stream to the user; devices such as `/dev/null` belong to all.
pub fn give(stream: BorrowedFd<'_>, uid: Uid, gid: Option<Gid>) -> rustix::io::Result<()> {
    let stat = fstat(stream)?;
    let null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && rustix::fs::major(stat.st_rdev) == 1;
    if null || stat.st_uid == uid.as_raw() {
        return Ok(());
    }
    fchown(stream.as_fd(), Some(uid), gid)
}

/// The last value of a variable.
fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    environment.iter().rev().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// Leaves behind what the agent has changed of a process's signals.
pub fn reset_signals() -> Result<(), SetupError> {
    use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
        .map_err(SetupError::step("unblock signals"))?;
    // SAFETY: no handler is installed, the default is put back.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(SetupError::step("reset SIGPIPE"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_variable_counts() {
        let environment = ["PATH=/a".to_owned(), "PATHS=/c".to_owned(), "PATH=/b".to_owned()];
        assert_eq!(variable(&environment, "PATH"), Some("/b"));
        assert_eq!(variable(&environment, "HOME"), None);
    }
}
