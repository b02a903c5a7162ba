//! Holding, releasing and ending vCPU threads.
//!
//! A thread looks at the command before each entry into the guest. A signal makes it leave the guest. A signal
//! that arrives between the look and the entry would be lost; so whoever waits for threads signals again every
//! millisecond until all have obeyed.
//!
//! A thread that answers an access of the guest may wait for a device, and the device for a system call of its
//! own that takes long, on a dead network file system say. So waiting has an end.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long to wait for threads to obey before they are signalled again.
const RETRY: Duration = Duration::from_millis(1);

/// How long to wait in all.
const PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU thread did not obey in time: it waits for a device.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("a vCPU waits for a device that does not answer")]
pub struct Stuck;

/// What vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Command {
    /// Wait outside the guest.
    Hold = 0,
    /// Run the guest.
    Run = 1,
    /// Return.
    End = 2,
}

#[derive(Debug, Default)]
struct Threads {
    holding: usize,
    ended: usize,
}

/// Shared by vCPU threads and the one who commands them.
#[derive(Debug)]
pub struct RunControl {
    command: AtomicU8,
    threads: Mutex<Threads>,
    changed: Condvar,
}

impl Default for RunControl {
    fn default() -> Self {
        Self {
            command: AtomicU8::new(Command::Hold as u8),
            threads: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

impl RunControl {
    /// What a vCPU thread is to do.
    pub fn command(&self) -> Command {
        match self.command.load(Ordering::SeqCst) {
            0 => Command::Hold,
            1 => Command::Run,
            _ => Command::End,
        }
    }

    /// A vCPU thread waits until it may go on.
    pub fn hold(&self) {
        let mut threads = self.lock();
        threads.holding += 1;
        self.changed.notify_all();
        while self.command() == Command::Hold {
            threads = self.changed.wait(threads).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        threads.holding -= 1;
    }

    /// A vCPU thread is about to return.
    pub fn ended(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }

    /// Lets all threads run.
    pub fn run(&self) {
        self.set(Command::Run);
    }

    /// Makes all threads leave the guest and wait, and waits until they do.
    pub fn hold_all<T>(&self, vcpus: &[JoinHandle<T>]) -> Result<(), Stuck> {
        self.set(Command::Hold);
        self.signal_until(vcpus, |threads| threads.holding + threads.ended >= vcpus.len())
            .inspect_err(|_| self.run())
    }

    /// Makes all threads return, and waits until they do. A thread that is stuck is left to itself: it runs no
    /// more code of the guest.
    pub fn end_all<T>(&self, vcpus: Vec<JoinHandle<T>>) {
        self.set(Command::End);
        match self.signal_until(&vcpus, |threads| threads.ended >= vcpus.len()) {
            Ok(()) => {
                for vcpu in vcpus {
                    let _ = vcpu.join();
                }
            }
            Err(stuck) => tracing::warn!(%stuck, "it is left behind"),
        }
    }

    fn set(&self, command: Command) {
        // With the lock held no thread can be between looking at the command and waiting for it to change.
        let _threads = self.lock();
        self.command.store(command as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn signal_until<T>(
        &self,
        vcpus: &[JoinHandle<T>],
        obeyed: impl Fn(&Threads) -> bool,
    ) -> Result<(), Stuck> {
        let deadline = Instant::now() + PATIENCE;
        let mut threads = self.lock();
        while !obeyed(&threads) {
            if Instant::now() >= deadline {
                return Err(Stuck);
            }
            for vcpu in vcpus {
                let _ = vcpu.kill(SIGRTMIN());
            }
            threads = match self.changed.wait_timeout(threads, RETRY) {
                Ok((threads, _)) => threads,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Makes the signal that takes vCPU threads out of the guest harmless otherwise.
pub fn install_signal() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
        .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn spinning(control: &Arc<RunControl>, count: &Arc<AtomicU64>) -> JoinHandle<()> {
        let (control, count) = (Arc::clone(control), Arc::clone(count));
        std::thread::spawn(move || {
            loop {
                match control.command() {
                    Command::Hold => control.hold(),
                    Command::Run => _ = count.fetch_add(1, Ordering::SeqCst),
                    Command::End => break control.ended(),
                }
            }
        })
    }

    #[test]
    fn nothing_runs_while_held_and_everything_ends() {
        install_signal().unwrap();
        let (control, count) = (Arc::new(RunControl::default()), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = (0..3).map(|_| spinning(&control, &count)).collect();
        for _ in 0..50 {
            control.hold_all(&threads).unwrap();
            let before = count.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(count.load(Ordering::SeqCst), before);
            control.run();
            while count.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
        control.end_all(threads);
    }
}
