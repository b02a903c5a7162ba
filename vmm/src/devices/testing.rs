//! The driver's side of virtqueues, for the tests of devices.

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};

/// The bytes of guest memory in tests.
pub const MEMORY_BYTES: u64 = 16 << 20;

/// The guest memory that a ring has for its tables and data.
const RING_BYTES: u64 = 4 << 20;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const DATA: u64 = 0x10000;

/// Memory for the rings of a device.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap()
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Part<'d> {
    /// The device reads this.
    Read(&'d [u8]),
    /// The device writes so many bytes.
    Write(u32),
    /// The device writes this part of guest memory.
    WriteAt(u64, u32),
}

/// A chain that was offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    pub head: u16,
    /// Where its buffers are, and how long.
    pub buffers: Vec<(u64, u32)>,
}

/// A ring, seen by its driver.
pub struct Driver {
    pub queue: Queue,
    memory: GuestMemory,
    base: u64,
    next_descriptor: u16,
    next_data: u64,
    offered: u16,
    seen: u16,
}

impl Driver {
    /// The ring with this number, of this size.
    pub fn new(memory: &GuestMemory, number: u64, size: u16) -> Self {
        let base = number * RING_BYTES;
        let mut queue = Queue::new(size).unwrap();
        queue.set_desc_table_address(Some(base as u32), Some(0));
        queue.set_avail_ring_address(Some((base + AVAIL) as u32), Some(0));
        queue.set_used_ring_address(Some((base + USED) as u32), Some(0));
        queue.set_ready(true);
        let memory = memory.clone();
        Self { queue, memory, base, next_descriptor: 0, next_data: base + DATA, offered: 0, seen: 0 }
    }

    /// Offers a chain.
    pub fn offer(&mut self, parts: &[Part<'_>]) -> Offered {
        let size = self.queue.size();
        let head = self.next_descriptor % size;
        let mut buffers = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let (address, len, mut flags) = self.place(*part);
            if index + 1 < parts.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let slot = self.next_descriptor % size;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            self.describe(slot, address, len, flags, self.next_descriptor % size);
            buffers.push((address, len));
        }
        self.offer_head(head);
        Offered { head, buffers }
    }

    /// Offers what a descriptor starts.
    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.queue.size());
        self.write(self.base + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.write(self.base + AVAIL + 2, &self.offered.to_le_bytes());
    }

    /// Writes a descriptor.
    pub fn describe(&self, slot: u16, address: u64, len: u32, flags: u32, next: u16) {
        let at = self.base + 16 * u64::from(slot);
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &(flags as u16).to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    /// The chains that came back since this was asked last: head and bytes written.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.base + USED + 2)).unwrap();
        let mut used = Vec::new();
        while self.seen != index {
            let slot = u64::from(self.seen % self.queue.size());
            let entry: u64 = self.memory.read_obj(GuestAddress(self.base + USED + 4 + 8 * slot)).unwrap();
            used.push((entry as u16, (entry >> 32) as u32));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    /// The index from which on the device wants to be notified, with event indices.
    pub fn avail_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.base + USED + 4 + 8 * u64::from(self.queue.size()))).unwrap()
    }

    /// How many chains were offered.
    pub fn offered(&self) -> u16 {
        self.offered
    }

    /// Sets the index whose use the driver wants to hear of, with event indices.
    pub fn set_used_event(&self, event: u16) {
        self.write(self.base + AVAIL + 4 + 2 * u64::from(self.queue.size()), &event.to_le_bytes());
    }

    /// The bytes of a buffer.
    pub fn read(&self, (address, len): (u64, u32)) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes to guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn place(&mut self, part: Part<'_>) -> (u64, u32, u32) {
        match part {
            Part::Read(bytes) => {
                let address = self.take(bytes.len());
                self.write(address, bytes);
                (address, bytes.len() as u32, 0)
            }
            Part::Write(len) => (self.take(len as usize), len, VRING_DESC_F_WRITE),
            Part::WriteAt(address, len) => (address, len, VRING_DESC_F_WRITE),
        }
    }

    /// Fresh guest memory; from the start again when a ring's share is used up.
    fn take(&mut self, len: usize) -> u64 {
        if self.next_data + len as u64 > self.base + RING_BYTES {
            self.next_data = self.base + DATA;
        }
        let address = self.next_data;
        self.next_data += (len as u64).next_multiple_of(64);
        address
    }
}

/// Notifies a device of a queue.
pub fn notify(
    device: &mut dyn VirtioDevice,
    queue: usize,
    drivers: &mut [Driver],
    memory: &GuestMemory,
) -> Result<Signals, BrokenRing> {
    let mut queues: Vec<&mut Queue> = drivers.iter_mut().map(|driver| &mut driver.queue).collect();
    device.notified(queue, &mut queues, memory)
}

/// Tells a device that its first descriptor is ready.
pub fn ready(
    device: &mut dyn VirtioDevice,
    drivers: &mut [Driver],
    memory: &GuestMemory,
) -> Result<Signals, BrokenRing> {
    let fd = device.event_fds()[0];
    let mut queues: Vec<&mut Queue> = drivers.iter_mut().map(|driver| &mut driver.queue).collect();
    device.ready(fd, &mut queues, memory)
}
