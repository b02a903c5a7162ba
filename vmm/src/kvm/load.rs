//! The first half of a start, in which the processor works on two things at once.
//!
//! Making a virtual machine is mostly waiting, for the host's kernel to let all its processors know. Loading a
//! guest is mostly copying. Neither needs anything of the other but the memory.

use super::bare::Bare;
use super::open::KvmUnusable;
use super::probe::{Speed, probe};
use crate::boot::{BootError, Guest};
use crate::config::Config;
use crate::memory::{self, Layout, MapError};

/// A bare machine and its speed, if KVM is usable, and the guest in its memory.
pub type Loaded = (Result<(Bare, Speed), KvmUnusable>, Result<Guest, BootError>);

/// Makes a bare machine and probes it, and loads the guest meanwhile. Its thread has ended on return.
pub fn load(config: &Config) -> Result<Loaded, MapError> {
    let layout = Layout::new(config.memory_bytes());
    let memory = memory::map(layout)?;
    Ok(std::thread::scope(|scope| {
        let loading = scope.spawn(|| Guest::load(&memory, layout, config.kernel(), config.image()));
        let probed = probe(layout, memory.clone(), config.vcpus());
        (probed, loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }))
}
