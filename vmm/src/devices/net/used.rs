//! Handing several chains back at once.
//!
//! A frame in several receive buffers belongs together: a driver that sees the first in the used ring takes
//! the others without waiting. So all of them are written to the ring before its index moves, once, past all.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::chain::{Limits, complete};
use crate::virtio::{BrokenRing, GuestMemory, rate};

/// Where the entries start in the used ring, after flags and index; the ring of heads in the available ring.
const RING_OFFSET: u64 = 4;

/// A chain to be handed back, and the bytes that were written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub head: u16,
    /// The bytes.
    pub written: u32,
}

/// Hands chains back together.
pub fn complete_together(
    queue: &mut Queue,
    memory: &GuestMemory,
    limits: &Limits,
    chains: &[Used],
) -> Result<(), BrokenRing> {
    let Some((last, others)) = chains.split_last() else { return Ok(()) };
    let mut next = queue.next_used();
    for used in others {
        rate::spend_bytes(used.written.into());
        let slot = u64::from(next & (queue.size() - 1));
        let entry = u64::from(used.written) << 32 | u64::from(used.head);
        queue
            .used_ring()
            .checked_add(RING_OFFSET + 8 * slot)
            .and_then(|address| memory.write_obj(entry.to_le(), GuestAddress(address)).ok())
            .ok_or_else(|| broken(limits, "the used ring is not in memory"))?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    complete(queue, memory, limits, last.head, last.written)
}

/// Whether the driver wants an interrupt for what was handed back since the used index was `before`.
pub fn wants_signal_since(
    before: u16,
    queue: &Queue,
    memory: &GuestMemory,
    limits: &Limits,
) -> Result<bool, BrokenRing> {
    let now = queue.next_used();
    if now == before {
        return Ok(false);
    }
    fence(Ordering::SeqCst);
    let load = |offset: u64| {
        let address = queue.avail_ring().checked_add(offset);
        let value = address.and_then(|address| memory.load(GuestAddress(address), Ordering::Relaxed).ok());
        value.map(u16::from_le).ok_or_else(|| broken(limits, "the available ring is not in memory"))
    };
    if queue.event_idx_enabled() {
        // The driver wants to hear when the entry with this number is used (virtio 1.2, 2.7.7).
        let event = load(RING_OFFSET + 2 * u64::from(queue.size()))?;
        return Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before));
    }
    Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

fn broken(limits: &Limits, reason: &str) -> BrokenRing {
    BrokenRing { queue: limits.queue, reason: reason.to_owned() }
}
