//! `hooks.startContainer`: programs of the container that run before its own, in its first process's place: with its
//! root, namespaces, user and rights, as in runc, and with its system call filter where that is loaded already.
//!
//! A hook finds the container's state on its standard input (the OCI specification's runtime.md, "State"). What it
//! prints is kept for the message of its failure.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal, WaitOptions};
use serde_json::json;

/// The most bytes of a hook's output in the message of its failure: its last ones.
const SHOWN_BYTES: u64 = 1024;

/// How often a hook is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// A hook failed, and with it the start.
#[derive(Debug, thiserror::Error)]
#[error("hooks.startContainer[{index}]: the hook {} {why}", path.display())]
pub struct HookError {
    index: usize,
    path: PathBuf,
    why: String,
}

/// The hooks of a container that is not started yet.
#[derive(Debug)]
pub struct StartHooks<'a> {
    hooks: &'a [Hook],
    state: File,
    output: File,
}

impl<'a> StartHooks<'a> {
    /// Prepares the hooks of the configuration, if it has any, to be run by this process.
    ///
    /// The files are made here, where no system call filter can forbid it.
    pub fn of(spec: &'a Spec, container: &str) -> io::Result<Option<Self>> {
        let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_deref());
        let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else { return Ok(None) };
        let mut state = memory_file("hook-state")?;
        state.write_all(state_of(spec, container).as_bytes())?;
        // The hooks share it, and none may have the next one read anything else.
        rustix::fs::fcntl_add_seals(
            &state,
            SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
        )?;
        Ok(Some(Self { hooks, state, output: memory_file("hook-output")? }))
    }

    /// Runs them one after the other; the first failure is the last one's end.
    pub fn run(&self) -> Result<(), HookError> {
        for (index, hook) in self.hooks.iter().enumerate() {
            self.run_one(hook).map_err(|why| HookError { index, path: hook.path().clone(), why })?;
        }
        Ok(())
    }

    fn run_one(&self, hook: &Hook) -> Result<(), String> {
        let mut child = self.spawn(hook).map_err(|e| format!("cannot be executed: {e}"))?;
        let timeout = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
        match wait(&mut child, timeout).map_err(|e| format!("cannot be waited for: {e}"))? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("{}{}", how(status), self.said())),
            None => {
                let seconds = timeout.unwrap_or_default().as_secs();
                Err(format!("ran longer than its timeout of {seconds} s and was killed{}", self.said()))
            }
        }
    }

    fn spawn(&self, hook: &Hook) -> io::Result<Child> {
        let mut command = Command::new(hook.path());
        if let Some((name, rest)) = hook.args().as_deref().and_then(<[_]>::split_first) {
            command.arg0(name).args(rest);
        }
        command.env_clear();
        command.envs(hook.env().iter().flatten().filter_map(|variable| variable.split_once('=')));
        (&self.state).seek(SeekFrom::Start(0))?;
        (&self.output).seek(SeekFrom::Start(0))?;
        self.output.set_len(0)?;
        command.stdin(self.state.try_clone()?).stdout(self.output.try_clone()?);
        command.stderr(self.output.try_clone()?);
        // A group of its own, to be killed as a whole.
        command.process_group(0).spawn()
    }

    /// The end of what the last hook has printed.
    fn said(&self) -> String {
        let length = self.output.metadata().map_or(0, |metadata| metadata.len());
        let mut text = vec![0; length.min(SHOWN_BYTES) as usize];
        let read = self.output.read_at(&mut text, length.saturating_sub(SHOWN_BYTES)).unwrap_or(0);
        text.truncate(read);
        match String::from_utf8_lossy(&text).trim() {
            "" => String::new(),
            text => format!(": {text}"),
        }
    }
}

fn memory_file(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL | MemfdFlags::ALLOW_SEALING;
    Ok(rustix::fs::memfd_create(name, flags)?.into())
}

/// The container's state. The bundle is a directory of the host and annotations are for its engine: the guest knows
/// neither.
fn state_of(spec: &Spec, container: &str) -> String {
    let state = json!({
        "ociVersion": spec.version(),
        "id": container,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "",
    });
    state.to_string()
}

/// Waits for a hook. One that takes too long is killed with all of its group, and is nothing.
fn wait(child: &mut Child, timeout: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    let Some(limit) = timeout.and_then(|timeout| Instant::now().checked_add(timeout)) else {
        return child.wait().map(Some);
    };
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= limit {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            // It can fail only where nothing is left to be killed.
            let _ = group.map(|group| rustix::process::kill_process_group(group, Signal::KILL));
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

/// Collects what hooks have left behind and has ended since.
///
/// In a pid namespace of its own this process is the parent of whatever hooks leave behind, and the program that
/// comes after it does not expect children.
pub fn reap_orphans() {
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "failed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(hooks: &str) -> Result<(), String> {
        let json = format!(r#"{{"ociVersion": "1.2.0", "hooks": {{"startContainer": {hooks}}}}}"#);
        let spec: Spec = serde_json::from_str(&json).unwrap();
        let hooks = StartHooks::of(&spec, "box").unwrap();
        hooks.map_or(Ok(()), |hooks| hooks.run()).map_err(|e| e.to_string())
    }

    fn shell(script: &str, rest: &str) -> String {
        format!(r#"{{"path": "/bin/sh", "args": ["hook", "-c", {script:?}]{rest}}}"#)
    }

    #[test]
    fn each_hook_has_the_state_its_arguments_and_its_environment() {
        let check = r#"state=$(cat); [ "$0-$WORD" = "hook-a=b" ] && [ -z "$HOME" ] || exit 3
            case $state in *'"id":"box"'*'"status":"created"'*) ;; *) echo "$state"; exit 4 ;; esac"#;
        let hook = shell(check, r#", "env": ["WORD=a=b"]"#);
        assert_eq!(run(&format!("[{hook}, {hook}]")), Ok(()));
        assert_eq!(run("[]"), Ok(()));
    }

    #[test]
    fn a_failure_names_the_hook_and_says_what_it_said() {
        let (good, bad) = (shell("echo fine", ""), shell("echo it is broken >&2; exit 5", ""));
        let message = run(&format!("[{good}, {bad}]")).unwrap_err();
        assert_eq!(
            message,
            "hooks.startContainer[1]: the hook /bin/sh failed with exit code 5: it is broken"
        );
        let message = run(r#"[{"path": "/no/such/hook"}]"#).unwrap_err();
        assert!(message.starts_with("hooks.startContainer[0]: the hook /no/such/hook cannot be executed: "));
        let message =
            run(&format!("[{}]", shell("head -c 5000 /dev/zero | tr '\\\\0' x; exit 1", ""))).unwrap_err();
        assert!(message.len() < 1200, "{}", message.len());
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_with_its_children() {
        let message =
            run(&format!("[{}]", shell("sleep 1000 & sleep 1000", r#", "timeout": 1"#))).unwrap_err();
        assert!(message.contains("ran longer than its timeout of 1 s and was killed"), "{message}");
    }
}
