//! The first half of a start, in which two processors have work.
//!
//! Making a virtual machine is mostly waiting, for the host's kernel to let all its processors know. Loading a
//! guest is mostly copying. Neither needs anything of the other but the memory; and who is done with the first
//! helps with the second.

use super::bare::Bare;
use super::open::KvmUnusable;
use super::probe::{Speed, probe};
use crate::boot::{BootError, Guest, Plan};
use crate::config::Config;
use crate::memory::{self, Layout, MapError};
use crate::virtio::GuestMemory;

/// A bare machine and its speed, if KVM is usable, and the guest in its memory.
pub type Loaded = (Result<(Bare, Speed), KvmUnusable>, Result<Guest, BootError>);

/// Makes a bare machine and probes it, and loads the guest meanwhile. Its thread has ended on return.
pub fn load(config: &Config) -> Result<Loaded, MapError> {
    let layout = Layout::new(config.memory_bytes());
    let memory = memory::map(layout)?;
    let make = || probe(layout, memory.clone(), config.vcpus());
    Ok(match Plan::new(layout, config.kernel(), config.image()) {
        Ok(plan) => load_meanwhile(&plan, &memory, make),
        Err(error) => (make(), Err(error)),
    })
}

fn load_meanwhile(
    plan: &Plan,
    memory: &GuestMemory,
    make: impl FnOnce() -> Result<(Bare, Speed), KvmUnusable>,
) -> Loaded {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| plan.work(memory));
        let made = make();
        if made.is_err() {
            plan.give_up();
        }
        let mine = plan.work(memory);
        let others = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (made, mine.and(others).map(|()| plan.guest()))
    })
}
