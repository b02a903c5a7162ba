//! What each thread may still do once the machine runs.
//!
//! A guest that breaks a device takes over the thread that runs it. So each kind of thread keeps what its work
//! needs and nothing else, of two things:
//!
//! - system calls, by a filter (`seccomp(2)`): those of its kind, with arguments checked where the call can do
//!   several things ([`calls`]);
//! - capabilities (`capabilities(7)`): those of a file server for the one that serves files, the one to kill QEMU
//!   for the one that does, none for others.
//!
//! The process as a whole has ids of its own by then ([`identity`]). The thread that makes files for the guest's users is
//! root again, with nothing of root's but what that takes.
//!
//! A thread confines itself before it takes anything from the guest, and no thread can be started afterwards. A
//! call that is not allowed ends the process, which says so with its last words. Nothing switches any of this off in
//! a program that was built without the feature `unconfined`, which is for measuring alone.

mod calls;
pub mod identity;
mod trap;

use std::cell::Cell;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::fs::Access;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs a vCPU, and the registers of devices.
    Vcpu,
    /// Moves bytes between queues and descriptors.
    Devices,
    /// Serves files, to virtio-fs and virtio-blk.
    Files(Access),
    /// Speaks vhost-user with QEMU.
    VhostUser,
    /// Keeps what a descriptor says: QEMU's messages, or the guest's console.
    Listener,
    /// The process's first: answers the runtime, and ends the machine.
    Control,
    /// The same where the machine is QEMU, a process of another user that has to be killed.
    ControlOfQemu,
}

/// What reading everybody's files takes. `CAP_DAC_READ_SEARCH` is less by its name, but opens files of the whole host by
/// their handles; this one changes nothing on read-only mounts.
const TO_READ: CapabilitySet = CapabilitySet::DAC_OVERRIDE;

/// What a file server has to do in the name of others.
const TO_WRITE: CapabilitySet = TO_READ
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// A thread could not be confined.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("giving up capabilities: {0}")]
    Capabilities(#[source] rustix::io::Errno),
    #[error("becoming the one who may make files of anybody: {0}")]
    Identity(#[source] rustix::io::Errno),
    #[error("making a filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
    #[error("installing a filter of system calls: {0}")]
    Install(#[from] seccompiler::Error),
    #[error("catching refused system calls: {0}")]
    Trap(#[source] std::io::Error),
}

thread_local! {
    static CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// Confines the calling thread, for good. Where that fails the process ends: a machine without it is not to run.
pub fn enter(kind: Kind) {
    if cfg!(feature = "unconfined") {
        eprintln!("sandbox-vmm: BUILT WITHOUT CONFINEMENT, for measuring: {kind:?} is not confined");
        return;
    }
    if let Err(error) = try_enter(kind) {
        eprintln!("sandbox-vmm: cannot confine a thread for {kind:?}: {error}");
        std::process::exit(1);
    }
    CONFINED.set(true);
}

/// Confines the calling thread unless it is already: for threads that a library starts.
pub fn enter_once(kind: Kind) {
    if !CONFINED.get() {
        enter(kind);
    }
}

fn try_enter(kind: Kind) -> Result<(), Error> {
    trap::install().map_err(Error::Trap)?;
    if kind == Kind::Files(Access::ReadWrite) {
        identity::become_root().map_err(Error::Identity)?;
    }
    keep_capabilities(match kind {
        Kind::Files(Access::ReadOnly) => TO_READ,
        Kind::Files(Access::ReadWrite) => TO_WRITE,
        Kind::ControlOfQemu => CapabilitySet::KILL,
        _ => CapabilitySet::empty(),
    })?;
    seccompiler::apply_filter(&filter(kind)?)?;
    Ok(())
}

/// Gives up all capabilities but these, of those that there are.
fn keep_capabilities(kept: CapabilitySet) -> Result<(), Error> {
    let held = rustix::thread::capabilities(None).map_err(Error::Capabilities)?;
    let sets = CapabilitySets {
        effective: held.effective & kept,
        permitted: held.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(Error::Capabilities)
}

fn filter(kind: Kind) -> Result<BpfProgram, Error> {
    let rules = calls::of(kind)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
