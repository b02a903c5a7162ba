//! What `sandbox-vmm` needs of a machine, whichever runs the guest.
//!
//! ```text
//!            resume             the guest ends, or stop
//!  Paused ──────────► Running ─────────────────────────► Ended
//!         ◄──────────
//!            pause
//! ```
//!
//! A machine is made paused, with nothing of the guest run yet. One thread drives it; the machine's own threads
//! and children only make [`Machine::ended`] readable.

use std::os::fd::BorrowedFd;

use sandbox_vmm_api::{ExitReason, MachineKind, Statistics};

use crate::fs::blocks::Blocks;

/// A machine with its guest.
pub trait Machine {
    /// Which machine it is.
    fn kind(&self) -> MachineKind;

    /// Lets the vCPUs run. A machine that runs already stays as it is.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Holds all vCPUs where they are; when it returns, none runs. A machine that is paused stays so.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Counters.
    fn statistics(&mut self) -> Result<Statistics, MachineError>;

    /// The block devices that its share has besides.
    fn blocks(&self) -> &Blocks;

    /// Ends the machine as if its power had been cut; when it returns, no code of the guest runs and the
    /// machine's threads and processes are gone. May be called at any time, more than once.
    fn stop(&mut self);

    /// Becomes readable when the machine has ended by itself.
    fn ended(&self) -> BorrowedFd<'_>;

    /// Why it has ended; to be asked once [`Machine::ended`] is readable. It implies [`Machine::stop`].
    fn exit_reason(&mut self) -> ExitReason;
}

/// A machine could not do what was asked, and goes on as before.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct MachineError {
    /// What was being done.
    pub what: &'static str,
    /// Why it failed.
    pub why: String,
}

impl MachineError {
    /// A step that failed, and the reason.
    pub fn new(what: &'static str, why: impl std::fmt::Display) -> Self {
        Self { what, why: why.to_string() }
    }
}
