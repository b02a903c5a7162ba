//! Taking descriptor chains from a split virtqueue that a hostile guest writes.
//!
//! A primer (virtio 1.2, 2.7). A queue is three tables in guest memory: descriptors (address, length, flags,
//! index of the next one), the *available* ring by which the driver offers chains of descriptors, and the
//! *used* ring by which the device hands them back. In a chain, what the device reads comes before what it
//! writes. With `VIRTIO_F_INDIRECT_DESC` a descriptor may name a table of descriptors elsewhere.
//!
//! Everything in those tables is the guest's word and may change while it is read. So a chain is copied out of
//! them once, whole, and checked in the copy: the index of the available ring may not run ahead of what was
//! taken by more than the queue's size, an index lies in its table, a chain is no longer than its table, its
//! order is right, every buffer is guest memory, and its bytes stay below the device's [`Limits`]. What breaks
//! these rules is a [`BrokenRing`]: the one answer to it is that the device stops until it is reset.
//!
//! A descriptor head offered twice is harmless as long as a device finishes each chain before it takes the
//! next. A device that keeps chains must find its own request by its own slot, never by the head.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::io::Buffers;
use super::{BrokenRing, GuestMemory, Signals, rate};

/// The bytes of a descriptor: address (8), length (4), flags (2), next (2).
const DESCRIPTOR_BYTES: u64 = 16;

/// Where the ring of heads starts in the available ring, after flags and index.
const AVAIL_RING_OFFSET: u64 = 4;

/// What a device accepts as one chain of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The queue's index, for messages.
    pub queue: usize,
    /// The most bytes of all its buffers together.
    pub max_bytes: u64,
    /// The most buffers.
    pub max_buffers: usize,
    /// Whether the driver accepted `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: Indirect,
}

/// Whether indirect tables were negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indirect {
    /// They were.
    Allowed,
    /// They were not, and are an error.
    Refused,
}

impl Limits {
    fn broken(&self, reason: impl Into<String>) -> BrokenRing {
        BrokenRing { queue: self.queue, reason: reason.into() }
    }
}

/// A chain that was copied from the ring and checked.
#[derive(Debug)]
pub struct Chain<'m> {
    head: u16,
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

impl Chain<'_> {
    /// The index by which it is handed back.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// What became of a chain that [`serve`] handed to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It goes back to the driver with so many bytes written to its writable part.
    Done(u32),
    /// The device cannot take it now: it stays available, and no more are taken.
    Later,
}

/// Takes the next chain, if there is one.
pub fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    limits: &Limits,
) -> Result<Option<Chain<'m>>, BrokenRing> {
    let Some(head) = next_head(queue, memory, limits)? else { return Ok(None) };
    let chain = read_chain(queue, memory, limits, head)?;
    rate::spend_operation();
    Ok(Some(chain))
}

/// Takes the next chain, if there is one, for a library that walks it by itself.
///
/// The index and the head are checked; the library has to check the rest, which it reads anew.
pub fn next_raw<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    limits: &Limits,
) -> Result<Option<DescriptorChain<&'m GuestMemory>>, BrokenRing> {
    if pending(queue, memory, limits)? == 0 {
        return Ok(None);
    }
    let mut iterator = queue.iter(memory).map_err(|error| limits.broken(error.to_string()))?;
    let chain = iterator.next();
    match chain {
        Some(chain) if chain.head_index() < queue.size() => {
            rate::spend_operation();
            Ok(Some(chain))
        }
        Some(chain) => Err(limits.broken(format!("descriptor {} is not in the table", chain.head_index()))),
        None => Err(limits.broken("the available ring cannot be read")),
    }
}

/// Puts back the chain that was taken last.
pub fn put_back(queue: &mut Queue) {
    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    rate::return_operation();
}

/// Hands a chain back to the driver, with so many bytes written to its writable part.
pub fn complete(
    queue: &mut Queue,
    memory: &GuestMemory,
    limits: &Limits,
    head: u16,
    written: u32,
) -> Result<(), BrokenRing> {
    rate::spend_bytes(written.into());
    queue.add_used(memory, head, written).map_err(|error| limits.broken(format!("used ring: {error}")))
}

/// Whether the driver wants an interrupt for what was completed since this was asked last.
pub fn wants_signal(queue: &mut Queue, memory: &GuestMemory, limits: &Limits) -> Result<bool, BrokenRing> {
    if queue.event_idx_enabled() {
        return queue.needs_notification(memory).map_err(|error| limits.broken(error.to_string()));
    }
    std::sync::atomic::fence(Ordering::SeqCst);
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .map_err(|error| limits.broken(format!("available ring: {error}")))?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Asks the driver to notify the queue from now on; says whether it has offered more in the meantime, for
/// which no notification comes. What it may not take because of its rate counts as nothing: the transport comes back
/// for that.
pub fn enable_notification(
    queue: &mut Queue,
    memory: &GuestMemory,
    limits: &Limits,
) -> Result<bool, BrokenRing> {
    let more = queue.enable_notification(memory).map_err(|error| limits.broken(error.to_string()))?;
    Ok(more && rate::admit())
}

/// Serves every chain that a queue has to a device, with notifications held off meanwhile, and says whether
/// the driver is owed an interrupt.
///
/// A chain that the device wants [`Served::Later`] leaves notifications on: the device comes back when its own
/// descriptor or a notification says so.
pub fn serve<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    limits: &Limits,
    mut device: impl FnMut(&mut Chain<'m>) -> Result<Served, BrokenRing>,
) -> Result<Signals, BrokenRing> {
    let broken = |error: virtio_queue::Error| limits.broken(error.to_string());
    let mut completed = false;
    'more: loop {
        queue.disable_notification(memory).map_err(broken)?;
        while let Some(mut chain) = next_chain(queue, memory, limits)? {
            let read = chain.readable.len() as u64;
            match device(&mut chain)? {
                Served::Done(written) => {
                    rate::spend_bytes(read);
                    complete(queue, memory, limits, chain.head, written)?;
                    completed = true;
                }
                Served::Later => {
                    put_back(queue);
                    queue.enable_notification(memory).map_err(broken)?;
                    break 'more;
                }
            }
        }
        if !enable_notification(queue, memory, limits)? {
            break;
        }
    }
    let mut signals = Signals::NONE;
    if completed && wants_signal(queue, memory, limits)? {
        signals.add(limits.queue);
    }
    Ok(signals)
}

/// How many chains the driver has offered that were not taken.
fn pending(queue: &Queue, memory: &GuestMemory, limits: &Limits) -> Result<u16, BrokenRing> {
    if !queue.ready() {
        return Ok(0);
    }
    let index = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(|error| limits.broken(format!("available ring: {error}")))?;
    let pending = (index - Wrapping(queue.next_avail())).0;
    if pending > queue.size() {
        return Err(limits.broken(format!("{pending} chains offered in a ring of {}", queue.size())));
    }
    Ok(if pending == 0 || rate::admit() { pending } else { 0 })
}

fn next_head(queue: &mut Queue, memory: &GuestMemory, limits: &Limits) -> Result<Option<u16>, BrokenRing> {
    if pending(queue, memory, limits)? == 0 {
        return Ok(None);
    }
    let next = queue.next_avail();
    let slot = u64::from(next & (queue.size() - 1));
    let address = queue
        .avail_ring()
        .checked_add(AVAIL_RING_OFFSET + 2 * slot)
        .ok_or_else(|| limits.broken("the available ring wraps round"))?;
    let head: u16 = memory
        .load(GuestAddress(address), Ordering::Acquire)
        .map_err(|error| limits.broken(format!("available ring: {error}")))?;
    queue.set_next_avail(next.wrapping_add(1));
    Ok(Some(u16::from_le(head)))
}

/// A table of descriptors: the queue's own, or an indirect one.
struct Table {
    address: u64,
    entries: u16,
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u32,
    next: u16,
}

impl Table {
    fn read(&self, memory: &GuestMemory, index: u16, limits: &Limits) -> Result<Descriptor, BrokenRing> {
        if index >= self.entries {
            return Err(limits.broken(format!("descriptor {index} is not in the table of {}", self.entries)));
        }
        let mut bytes = [0u8; DESCRIPTOR_BYTES as usize];
        self.address
            .checked_add(u64::from(index) * DESCRIPTOR_BYTES)
            .and_then(|address| memory.read_slice(&mut bytes, GuestAddress(address)).ok())
            .ok_or_else(|| limits.broken(format!("descriptor {index} is not in memory")))?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u32::from(u16::from_le_bytes([f0, f1])),
            next: u16::from_le_bytes([n0, n1]),
        })
    }

    /// The indirect table that a descriptor names.
    fn indirect(descriptor: &Descriptor, limits: &Limits) -> Result<Self, BrokenRing> {
        if limits.indirect == Indirect::Refused {
            return Err(limits.broken("an indirect descriptor that was not negotiated"));
        }
        if descriptor.flags & (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE) != 0 {
            return Err(limits.broken("an indirect descriptor with a successor or to be written"));
        }
        let len = u64::from(descriptor.len);
        let entries = u16::try_from(len / DESCRIPTOR_BYTES).unwrap_or(u16::MAX);
        if entries == 0 || len % DESCRIPTOR_BYTES != 0 || usize::from(entries) > limits.max_buffers {
            return Err(limits.broken(format!("an indirect table of {len} bytes")));
        }
        Ok(Self { address: descriptor.address, entries })
    }
}

fn read_chain<'m>(
    queue: &Queue,
    memory: &'m GuestMemory,
    limits: &Limits,
    head: u16,
) -> Result<Chain<'m>, BrokenRing> {
    let mut table = Table { address: queue.desc_table(), entries: queue.size() };
    let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
    let mut descriptor = table.read(memory, head, limits)?;
    if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
        table = Table::indirect(&descriptor, limits)?;
        descriptor = table.read(memory, 0, limits)?;
    }
    let longest = limits.max_buffers.min(usize::from(table.entries));
    for _ in 0..longest {
        add_buffer(&mut chain, memory, limits, &descriptor)?;
        if descriptor.flags & VRING_DESC_F_NEXT == 0 {
            return Ok(chain);
        }
        descriptor = table.read(memory, descriptor.next, limits)?;
    }
    Err(limits.broken(format!("a chain of more than {longest} buffers")))
}

fn add_buffer<'m>(
    chain: &mut Chain<'m>,
    memory: &'m GuestMemory,
    limits: &Limits,
    descriptor: &Descriptor,
) -> Result<(), BrokenRing> {
    if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
        return Err(limits.broken("an indirect descriptor inside a chain"));
    }
    let total = chain.readable.len() as u64 + chain.writable.len() as u64 + u64::from(descriptor.len);
    if total > limits.max_bytes {
        return Err(limits.broken(format!("a chain of more than {} bytes", limits.max_bytes)));
    }
    let slice =
        memory.get_slice(GuestAddress(descriptor.address), descriptor.len as usize).map_err(|_| {
            limits.broken(format!(
                "a buffer of {} bytes at {:#x} is not in memory",
                descriptor.len, descriptor.address
            ))
        })?;
    if descriptor.flags & VRING_DESC_F_WRITE != 0 {
        chain.writable.push(slice);
    } else if chain.writable.is_empty() {
        chain.readable.push(slice);
    } else {
        return Err(limits.broken("a buffer to be read after one to be written"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
