//! Hooks that run on the host: programs that an engine wants to be run at certain points of a sandbox's life.
//!
//! | hook | runs | when it fails |
//! |---|---|---|
//! | `prestart`, `createRuntime` | in the monitor, when the machine runs and before the container is made | the sandbox ends |
//! | `createContainer` | in the monitor, when the container is made and before it stands for others; with the container's root file system and volumes in their places, see [`crate::view`] | the sandbox ends |
//! | `poststart` | in the monitor, when the process runs | it is said, and life goes on |
//! | `poststop` | in whoever removes the sandbox, when nothing of it runs any more | it is said, and life goes on |
//!
//! A hook finds the sandbox's state on its standard input, as the OCI specification says (config.md, "POSIX-platform
//! Hooks"). `startContainer` runs in the guest, see the agent. The programs of all others are the host's, and have the
//! host's namespaces: those of the container are in the guest. What `createContainer` mounts nobody else sees; what it
//! writes to the root file system the container has, where writes go through to the host.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Hooks, Spec};
use serde::{Deserialize, Serialize};

use crate::printable::printable;
use crate::process;
use crate::state::{Record, Status};

/// The most bytes of a hook's output that an error shows.
const SHOWN_BYTES: u64 = 2048;

/// The hooks of a configuration that run on the host.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct HostHooks {
    /// Before the container is made.
    pub prestart: Vec<Hook>,
    /// Then.
    pub create_runtime: Vec<Hook>,
    /// When the container is made: `createContainer`.
    pub create_container: Vec<Hook>,
    /// When the process runs.
    pub poststart: Vec<Hook>,
    /// When nothing runs any more.
    pub poststop: Vec<Hook>,
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
#[error("the {point} hook {} {why}", path.display())]
pub struct HookError {
    point: &'static str,
    path: std::path::PathBuf,
    why: String,
}

impl HostHooks {
    /// Those of a configuration.
    pub fn of(spec: &Spec) -> Self {
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        let Some(hooks) = spec.hooks() else { return Self::default() };
        Self {
            prestart: list(hooks.prestart()),
            create_runtime: list(hooks.create_runtime()),
            create_container: list(hooks.create_container()),
            poststart: list(hooks.poststart()),
            poststop: list(hooks.poststop()),
        }
    }

    /// Whether any come before the container is made.
    pub fn come_before(&self) -> bool {
        !(self.prestart.is_empty() && self.create_runtime.is_empty())
    }

    /// Whether any come before its process starts.
    pub fn come_before_start(&self) -> bool {
        self.come_before() || !self.create_container.is_empty()
    }

    /// Runs those that come before the container is made.
    pub fn run_before(&self, record: &Record) -> Result<(), HookError> {
        run("prestart", &self.prestart, record, Status::Creating)?;
        run("createRuntime", &self.create_runtime, record, Status::Creating)
    }
}

/// The hooks of a configuration with the names of their points.
pub fn points(hooks: &Hooks) -> [(&'static str, &Option<Vec<Hook>>); 6] {
    [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ]
}

/// What the guest gets of a configuration's hooks: those that run there.
pub fn for_guest(hooks: Option<&Hooks>) -> Option<Hooks> {
    let start = hooks?.start_container().clone()?;
    let mut guest = Hooks::default();
    guest.set_start_container(Some(start));
    Some(guest)
}

/// Runs hooks one after the other, up to the first that fails.
pub fn run(point: &'static str, hooks: &[Hook], record: &Record, status: Status) -> Result<(), HookError> {
    hooks.iter().try_for_each(|hook| {
        run_one(hook, record, status).map_err(|why| HookError { point, path: hook.path().clone(), why })
    })
}

/// Runs all hooks; returns what went wrong with those that failed.
pub fn run_all(point: &'static str, hooks: &[Hook], record: &Record, status: Status) -> Vec<HookError> {
    hooks.iter().filter_map(|hook| run(point, std::slice::from_ref(hook), record, status).err()).collect()
}

fn run_one(hook: &Hook, record: &Record, status: Status) -> Result<(), String> {
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    // Without an environment of its own it has ours, as with other runtimes.
    if let Some(env) = hook.env() {
        command.env_clear().envs(env.iter().filter_map(|variable| variable.split_once('=')));
    }
    // A file, not a pipe: what a hook leaves running may keep it open for as long as it likes.
    let output = File::from(
        rustix::fs::memfd_create("hook-output", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|error| format!("cannot have its output kept: {error}"))?,
    );
    let copy = || output.try_clone().map_err(|error| format!("cannot have its output kept: {error}"));
    command.stdin(Stdio::piped()).stdout(copy()?).stderr(copy()?);
    command.current_dir(&record.bundle);
    let mut child = command.spawn().map_err(|error| format!("cannot be started: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not read it does not want it.
        let _ = stdin.write_all(record.oci_state(status).to_string().as_bytes());
    }
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let ended = match (limit, process::pidfd(child.id())) {
        (Some(limit), Ok(pidfd)) => process::wait_for(&pidfd, Instant::now() + limit),
        _ => true,
    };
    if !ended {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| format!("cannot be waited for: {error}"))?;
    match (ended, status.success()) {
        (false, _) => {
            Err(format!("was killed: it ran longer than its timeout of {:?}", limit.unwrap_or_default()))
        }
        (true, true) => Ok(()),
        (true, false) => Err(format!("failed ({status}){}", said(&output))),
    }
}

/// The end of what a hook printed.
fn said(output: &File) -> String {
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let start = length.saturating_sub(SHOWN_BYTES);
    let mut bytes = vec![0; usize::try_from(length - start).unwrap_or(0)];
    if output.read_exact_at(&mut bytes, start).is_err() {
        return String::new();
    }
    match String::from_utf8_lossy(&bytes).trim() {
        "" => String::new(),
        text => format!(": {}", printable(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into())
            .set_args(Some(vec!["sh".into(), "-c".into(), script.into()]))
            .set_env(Some(vec!["WORD=from the hook".into()]))
            .set_timeout(timeout);
        hook
    }

    fn run_script(script: &str, timeout: Option<i64>) -> Result<(), HookError> {
        let record = Record::for_tests("box");
        run("createRuntime", &[hook(script, timeout)], &record, Status::Creating)
    }

    #[test]
    fn a_hook_has_the_state_its_arguments_and_its_environment_only() {
        let check = r#"state=$(cat); case $state in *'"status":"creating"'*) ;; *) exit 3 ;; esac
            [ "$WORD" = "from the hook" ] && [ -z "$HOME" ]"#;
        run_script(check, None).unwrap();
    }

    #[test]
    fn a_failure_says_what_the_hook_said() {
        let error = run_script("echo it is broken >&2; exit 5", None).unwrap_err().to_string();
        assert!(error.contains("createRuntime") && error.contains("/bin/sh"), "{error}");
        assert!(error.contains("it is broken") && error.contains('5'), "{error}");
        let mut missing = hook("", None);
        missing.set_path("/no/such/hook".into());
        let record = Record::for_tests("box");
        let error = run("poststop", &[missing], &record, Status::Stopped).unwrap_err().to_string();
        assert!(error.contains("/no/such/hook cannot be started"), "{error}");
    }

    #[test]
    fn a_hook_before_the_container_is_named_by_its_point() {
        let record = Record::for_tests("box");
        let (good, bad) = (vec![hook("exit 0", None)], vec![hook("exit 1", None)]);
        let both = |prestart: &Vec<Hook>, create_runtime: &Vec<Hook>| {
            let (prestart, create_runtime) = (prestart.clone(), create_runtime.clone());
            HostHooks { prestart, create_runtime, ..HostHooks::default() }.run_before(&record)
        };
        assert!(both(&bad, &good).unwrap_err().to_string().starts_with("the prestart hook"));
        assert!(both(&good, &bad).unwrap_err().to_string().starts_with("the createRuntime hook"));
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let error = run_script("exec sleep 100", Some(1)).unwrap_err().to_string();
        assert!(error.contains("timeout of 1s"), "{error}");
    }
}
