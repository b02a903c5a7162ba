//! A virtual machine's process: started, listened to, ended.
//!
//! `sandbox-vmm` gets its configuration on standard input and reports on a socket. Both directions of that
//! socket are a lifeline: we close it and the machine stops; it closes and the machine is gone. The process is
//! killed by the kernel should ours die.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sandbox_vmm_api::{EVENT_FD, VmConfig, VmEvent};

use crate::descriptor::{self, Ties};
use crate::printable::printable;
use crate::sandbox::{Event, Sender};
use crate::{process, thread};

/// The most bytes of a report: a panic's 64 lines of console, with room to spare.
const MAX_EVENT_BYTES: u64 = 256 << 10;

/// How many lines of the machine's log are kept for the error of a machine that died.
const LOG_LINES: usize = 12;

/// The most bytes of a line of the machine's log.
const MAX_LOG_LINE_BYTES: u64 = 4096;

/// How long the log of a dead machine may take to come to its end.
const LOG_TIME: Duration = Duration::from_secs(1);

/// How long a machine may take to stop before it is killed.
const STOP_TIME: Duration = Duration::from_secs(3);

/// Why a machine's process could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {}: {error}", program.display())]
pub struct MachineError {
    program: PathBuf,
    error: io::Error,
}

/// Whether the machine's log goes to our standard error as well.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogTo {
    /// Only its end is kept, for an error.
    Memory,
    /// To standard error too.
    Stderr,
}

/// A machine's process. Dropping it ends the machine and waits until nothing of it is left.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    pidfd: OwnedFd,
    events: UnixStream,
    log: Arc<Mutex<VecDeque<String>>>,
    logger: Option<JoinHandle<()>>,
}

impl Machine {
    /// Starts the process, which inherits `taps` under the numbers that `config` has. What it reports arrives as [`Event::Machine`], its end as [`Event::MachineGone`].
    pub fn start(
        program: &Path,
        config: &VmConfig,
        taps: &[(BorrowedFd<'_>, RawFd)],
        log_to: LogTo,
        events: &Sender,
    ) -> Result<Self, MachineError> {
        Self::spawn(program, config, taps, log_to, events)
            .map_err(|error| MachineError { program: program.into(), error })
    }

    fn spawn(
        program: &Path,
        config: &VmConfig,
        taps: &[(BorrowedFd<'_>, RawFd)],
        log_to: LogTo,
        sender: &Sender,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(program);
        command.stdin(config_file(config)?).stdout(Stdio::null()).stderr(Stdio::piped());
        let given = [&[(theirs.as_fd(), EVENT_FD)], taps].concat();
        descriptor::give(&mut command, &given, Ties::Machine)?;
        let mut child = descriptor::spawn_alone(&mut command)?;
        let stderr = child.stderr.take();
        let pidfd = match process::pidfd(child.id()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        // From here on dropping ends the process.
        let mut machine = Self { child, pidfd, events: ours, log: Arc::default(), logger: None };
        let log = Arc::clone(&machine.log);
        machine.logger = Some(thread::spawn("machine-log", move || {
            stderr.into_iter().for_each(|stderr| keep_log(stderr, &log, log_to));
        })?);
        let (reports, sender) = (machine.events.try_clone()?, sender.clone());
        thread::spawn("machine-events", move || {
            read_events(reports, &sender);
            let _ = sender.send(Event::MachineGone);
        })?;
        Ok(machine)
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A descriptor of the process.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Waits until the process has ended. `false`: it has not, by the deadline.
    pub fn wait(&mut self, deadline: Instant) -> bool {
        process::wait_for(&self.pidfd, deadline)
    }

    /// How a machine that reported nothing ended: its status, and the end of its log.
    pub fn last_words(&mut self) -> String {
        let _ = self.events.shutdown(Shutdown::Both);
        self.wait(Instant::now() + STOP_TIME);
        self.wait_for_log();
        let status = match self.child.try_wait() {
            Ok(Some(status)) => status.to_string(),
            Ok(None) => "it closed its connection".into(),
            Err(error) => error.to_string(),
        };
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().fold(status, |words, line| format!("{words}\n  {line}"))
    }

    /// Until the log has been read to its end, or somebody has kept it open for too long.
    fn wait_for_log(&self) {
        let deadline = Instant::now() + LOG_TIME;
        while self.logger.as_ref().is_some_and(|logger| !logger.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(&mut self) {
        let _ = self.events.shutdown(Shutdown::Both);
        if !self.wait(Instant::now() + STOP_TIME) {
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
        let _ = self.child.wait();
        process::reap_orphans(Instant::now() + STOP_TIME);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// The configuration as a file in memory: unlike a pipe it takes all of it at once, whether it is read or not.
fn config_file(config: &VmConfig) -> io::Result<Stdio> {
    let memory = rustix::fs::memfd_create("vm-config", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(memory);
    file.write_all(&serde_json::to_vec(config)?)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
}

fn read_events(from: UnixStream, sender: &Sender) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        match from.by_ref().take(MAX_EVENT_BYTES).read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => {}
            _ => return,
        }
        // A line that is no event ends the conversation: the process has lost its mind.
        let Ok(event) = serde_json::from_slice::<VmEvent>(&line) else { return };
        if sender.send(Event::Machine(event)).is_err() {
            return;
        }
    }
}

fn keep_log(from: impl Read, log: &Mutex<VecDeque<String>>, to: LogTo) {
    let mut from = BufReader::with_capacity(1024, from);
    loop {
        let mut line = Vec::new();
        match from.by_ref().take(MAX_LOG_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = printable(String::from_utf8_lossy(&line).trim_end());
        if to == LogTo::Stderr {
            eprintln!("sandbox-vmm: {line}");
        }
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() == LOG_LINES {
            log.pop_front();
        }
        log.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use sandbox_vmm_api::ExitReason;

    use super::*;
    use crate::sandbox::Inbox;

    /// How many events are understood of what a machine sends, before the conversation is over.
    fn understood(bytes: Vec<u8>) -> usize {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // It fails where not all of it is read.
        let machine = std::thread::spawn(move || theirs.write_all(&bytes));
        let inbox = Inbox::new();
        read_events(ours, &inbox.sender());
        let _ = machine.join().unwrap();
        std::iter::from_fn(|| inbox.next(Some(Instant::now()))).count()
    }

    #[test]
    fn a_line_without_end_or_sense_ends_the_conversation() {
        let event =
            [serde_json::to_vec(&VmEvent::Exited { reason: ExitReason::PowerOff }).unwrap(), b"\n".to_vec()]
                .concat();
        assert_eq!(understood(event.repeat(2)), 2);
        for nonsense in [vec![b' '; 4 << 20], b"{}\n".to_vec(), b"\xff\n".to_vec(), event[1..].to_vec()] {
            assert_eq!(understood([&event[..], &nonsense, &event].concat()), 1);
        }
    }
}
