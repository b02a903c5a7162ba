//! The first half of a start, in which two processors have work.
//!
//! Making a virtual machine is mostly waiting, for the host's kernel to let all its processors know. Loading a
//! guest is mostly copying. Neither needs anything of the other but the memory; and who is done with the first
//! helps with the second. The second processor also makes the jail's network.

use super::bare::Bare;
use super::open::KvmUnusable;
use super::probe::{Speed, probe};
use crate::boot::{BootError, Guest, Plan};
use crate::config::Config;
use crate::jail::{self, Apart};
use crate::memory::{self, Layout, MapError};
use crate::virtio::GuestMemory;

/// What the two halves came to.
pub struct Loaded {
    /// A bare machine and its speed, if KVM is usable.
    pub probed: Result<(Bare, Speed), KvmUnusable>,
    /// The guest in its memory.
    pub guest: Result<Guest, BootError>,
    /// Namespaces for the jail.
    pub apart: Result<Apart, jail::Error>,
}

/// Makes a bare machine and probes it, and loads the guest meanwhile. Its thread has ended on return.
pub fn load(config: &Config) -> Result<Loaded, MapError> {
    let layout = Layout::new(config.memory_bytes());
    let memory = memory::map(layout)?;
    let make = || probe(layout, memory.clone(), config.vcpus());
    Ok(match Plan::new(layout, config.kernel(), config.image()) {
        Ok(plan) => load_meanwhile(&plan, &memory, make),
        Err(error) => Loaded { probed: make(), guest: Err(error), apart: Apart::make() },
    })
}

fn load_meanwhile(
    plan: &Plan,
    memory: &GuestMemory,
    make: impl FnOnce() -> Result<(Bare, Speed), KvmUnusable>,
) -> Loaded {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| (Apart::make(), plan.work(memory)));
        let probed = make();
        if probed.is_err() {
            plan.give_up();
        }
        let mine = plan.work(memory);
        let (apart, others) = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Loaded { probed, guest: mine.and(others).map(|()| plan.guest()), apart }
    })
}
