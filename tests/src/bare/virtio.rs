//! The driver's side of virtio-mmio (virtio 1.2, 2.7 and 4.2), without any manners of its own.

use super::Script;
use crate::place::on_kvm;

/// The memory of a bare guest.
pub const MEMORY_BYTES: u64 = 128 << 20;

/// Memory for buffers.
pub const DATA: u32 = 48 << 20;

/// Memory for rings.
const RINGS: u32 = 32 << 20;
const RING_BYTES: u32 = 0x1_0000;

/// Identities of devices (virtio 1.2, 5).
#[expect(missing_docs, reason = "they are the specification's")]
pub mod device {
    pub const NET: u32 = 1;
    pub const BLK: u32 = 2;
    pub const RNG: u32 = 4;
    pub const BALLOON: u32 = 5;
    pub const VSOCK: u32 = 19;
    pub const FS: u32 = 26;
}

/// Registers (virtio 1.2, 4.2.2).
#[expect(missing_docs, reason = "they are the specification's")]
pub mod register {
    pub const FEATURES: u32 = 0x20;
    pub const FEATURES_SELECT: u32 = 0x24;
    pub const QUEUE_SELECT: u32 = 0x30;
    pub const QUEUE_SIZE: u32 = 0x38;
    pub const QUEUE_READY: u32 = 0x44;
    pub const NOTIFY: u32 = 0x50;
    pub const STATUS: u32 = 0x70;
    pub const DESCRIPTORS: u32 = 0x80;
    pub const AVAILABLE: u32 = 0x90;
    pub const USED: u32 = 0xa0;
    pub const SHARED_MEMORY_LENGTH: u32 = 0xb0;
    pub const CONFIGURATION: u32 = 0x100;
    /// Where the registers end.
    pub const END: u32 = 0x200;
}

/// Bits of the status.
#[expect(missing_docs, reason = "they are the specification's")]
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}

/// Flags of descriptors.
#[expect(missing_docs, reason = "they are the specification's")]
pub mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// `VIRTIO_F_VERSION_1`, in the upper half of the features.
const VERSION_1: u32 = 1;

/// A descriptor, as wrong as it may be.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "they are the specification's")]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// Its bytes in a table.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A queue in the guest's memory.
pub struct Ring {
    /// Its number.
    pub index: u32,
    /// Its size.
    pub size: u16,
    /// Where its table of descriptors is; like the others, it may be moved before the device is brought up.
    pub descriptors: u64,
    /// Where its available ring is.
    pub available: u64,
    /// Where its used ring is.
    pub used: u64,
    offered: u16,
}

impl Ring {
    /// The device's queue with this index.
    pub fn new(index: u32, size: u16) -> Self {
        let base = RINGS + index * RING_BYTES;
        let at = |offset: u32| u64::from(base + offset);
        Self { index, size, descriptors: at(0), available: at(0x4000), used: at(0x8000), offered: 0 }
    }

    /// How many chains were offered since the device was brought up.
    pub fn offered(&self) -> u16 {
        self.offered
    }

    /// Where its used ring is.
    pub fn used_address(&self) -> u32 {
        self.used as u32
    }
}

impl Script {
    /// Selects a device wherever the machine has it.
    pub fn select(&mut self, identity: u32) {
        if on_kvm() {
            self.select_from(0xd000_0000, 0x1000, identity);
        } else {
            self.select_from(0xfeb0_0000, 0x200, identity);
        }
    }

    /// Resets the selected device and negotiates these features of the lower half.
    pub fn negotiate(&mut self, features: u32) {
        use status::*;
        self.set(register::STATUS, 0);
        self.set(register::STATUS, ACKNOWLEDGE);
        self.set(register::STATUS, ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0, features), (1, VERSION_1)] {
            self.set(register::FEATURES_SELECT, select);
            self.set(register::FEATURES, half);
        }
        self.set(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Tells the selected device where a queue is.
    pub fn place(&mut self, ring: &Ring) {
        self.set(register::QUEUE_SELECT, ring.index);
        self.set(register::QUEUE_SIZE, ring.size.into());
        let tables = [
            (register::DESCRIPTORS, ring.descriptors),
            (register::AVAILABLE, ring.available),
            (register::USED, ring.used),
        ];
        for (register, address) in tables {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(register::QUEUE_READY, 1);
    }

    /// Sets DRIVER_OK.
    pub fn driver_ok(&mut self) {
        use status::*;
        self.set(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Brings the selected device up with these queues, which are empty.
    pub fn bring_up(&mut self, features: u32, rings: &mut [Ring]) {
        self.negotiate(features);
        for ring in rings.iter_mut() {
            self.fill(RINGS + ring.index * RING_BYTES, 0, RING_BYTES / 4);
            ring.offered = 0;
            self.place(ring);
        }
        self.driver_ok();
    }

    /// Writes a descriptor.
    pub fn describe(&mut self, ring: &Ring, slot: u16, descriptor: Descriptor) {
        self.copy(ring.descriptors as u32 + 16 * u32::from(slot), &descriptor.bytes());
    }

    /// Writes a chain of descriptors from `slot` on, of buffers with their flags, and offers it.
    pub fn offer_chain(&mut self, ring: &mut Ring, slot: u16, buffers: &[(u64, u32, u16)]) {
        for (at, &(address, len, flags)) in (slot..).zip(buffers) {
            let last = usize::from(at - slot) + 1 == buffers.len();
            let next = if last { 0 } else { flag::NEXT };
            self.describe(ring, at, Descriptor { address, len, flags: flags | next, next: at + 1 });
        }
        self.offer(ring, slot);
    }

    /// Has a request served: what the device reads, and where it may write how much.
    pub fn ask(&mut self, ring: &mut Ring, readable: &[u8], (answer, room): (u32, u32)) {
        self.copy(DATA, readable);
        let parts = [(DATA.into(), readable.len() as u32, 0), (answer.into(), room, flag::WRITE)];
        let buffers: Vec<_> = parts.into_iter().filter(|&(_, len, _)| len > 0).collect();
        self.offer_chain(ring, 0, &buffers);
        self.notify(ring);
        self.wait_used(ring);
    }

    /// Offers what a descriptor starts.
    pub fn offer(&mut self, ring: &mut Ring, head: u16) {
        let slot = u32::from(ring.offered % ring.size);
        self.write16(ring.available as u32 + 4 + 2 * slot, head);
        self.offer_more(ring, 1);
    }

    /// Moves the index of the available ring, whatever is in it.
    pub fn offer_more(&mut self, ring: &mut Ring, chains: u16) {
        ring.offered = ring.offered.wrapping_add(chains);
        self.write16(ring.available as u32 + 2, ring.offered);
    }

    /// Notifies the selected device of a queue.
    pub fn notify(&mut self, ring: &Ring) {
        self.set(register::NOTIFY, ring.index);
    }

    /// Waits until all that was offered has come back.
    pub fn wait_used(&mut self, ring: &Ring) {
        self.wait(ring.used as u32, 0xffff_0000, u32::from(ring.offered) << 16);
    }
}
