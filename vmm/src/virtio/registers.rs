//! The registers of a virtio-mmio device, as a state machine without any effect of its own.
//!
//! A driver brings a device up in fixed steps (virtio 1.2, 3.1.1), each a bit of the status register, set one
//! at a time and never taken back but by a reset:
//!
//! ```text
//!  0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK
//!                        │            │
//!                 features are    queues are
//!                 chosen here     set up here
//! ```
//!
//! A register that is written outside its step keeps its value. What is set up here is a *plan*: at DRIVER_OK
//! the transport makes the live queues from a copy of it, so nothing that a driver writes later can change a
//! queue in use. A driver whose features are not a subset of those offered, or that refuses
//! `VIRTIO_F_VERSION_1`, does not get FEATURES_OK.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};

/// Register offsets (virtio 1.2, 4.2.2).
mod offset {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_FIRST: u64 = 0xb0;
    pub const SHM_LAST: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
}

/// Where the driver notifies a queue: an ioeventfd listens there.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Where the driver reads why it was interrupted.
pub const INTERRUPT_STATUS: u64 = 0x60;
/// Where the driver acknowledges an interrupt.
pub const INTERRUPT_ACK: u64 = 0x64;
/// Where the device's own configuration starts.
pub const CONFIG_SPACE: u64 = 0x100;

/// `virt`, little endian.
const MAGIC_VALUE: u32 = 0x7472_6976;
/// The transport of virtio 1.0 and later.
const TRANSPORT_VERSION: u32 = 2;
/// `sand`, little endian; drivers ignore it.
const VENDOR: u32 = 0x646e_6173;

/// A queue as the driver has set it up so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePlan {
    /// The largest size, a power of two.
    pub max_size: u16,
    /// The size, a power of two of at most `max_size`.
    pub size: u16,
    /// Whether the driver uses it.
    pub ready: bool,
    /// The guest address of the descriptor table.
    pub descriptors: u64,
    /// The guest address of the available ring.
    pub available: u64,
    /// The guest address of the used ring.
    pub used: u64,
}

/// What the transport has to do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver has set DRIVER_OK: make the queues, start the device.
    Activate,
    /// The driver has reset the device.
    Reset,
}

/// The registers.
#[derive(Debug)]
pub struct Registers {
    device_type: u32,
    offered: u64,
    accepted: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    status: u32,
    queues: Vec<QueuePlan>,
}

impl Registers {
    /// The registers of a device after a reset.
    pub fn new(device_type: u32, offered: u64, queue_sizes: &[u16]) -> Self {
        let plan = |&max_size| QueuePlan {
            max_size,
            size: max_size,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
        };
        Self {
            device_type,
            offered,
            accepted: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            status: 0,
            queues: queue_sizes.iter().map(plan).collect(),
        }
    }

    /// The features that the driver has accepted: final once FEATURES_OK is set.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The queues as the driver has set them up.
    pub fn queues(&self) -> &[QueuePlan] {
        &self.queues
    }

    /// The device cannot go on: the driver has to reset it.
    pub fn set_needs_reset(&mut self) {
        self.status |= NEEDS_RESET;
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        use offset::*;
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => TRANSPORT_VERSION,
            DEVICE_ID => self.device_type,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.offered, self.device_features_sel),
            QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            STATUS => self.status,
            // No shared memory: a length and an address of all ones say so.
            SHM_FIRST..=SHM_LAST => u32::MAX,
            // The configuration of our devices does not change while a driver reads it.
            CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u32) -> Effect {
        use offset::*;
        match offset {
            STATUS => return self.write_status(value),
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            QUEUE_SEL => self.queue_sel = value,
            DRIVER_FEATURES => self.write_features(value),
            QUEUE_NUM | QUEUE_READY | QUEUE_DESC_LOW..=QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        // NEEDS_RESET is the device's to set; a driver that writes back what it read changes nothing.
        let before = self.status & !NEEDS_RESET;
        let value = value & !NEEDS_RESET;
        let added = value & !before;
        if value & before != before {
            return Effect::None;
        }
        match (before, added) {
            (0, ACKNOWLEDGE) | (ACKNOWLEDGED, DRIVER) => self.status |= added,
            (DRIVING, FEATURES_OK) if self.features_are_acceptable() => self.status |= FEATURES_OK,
            (NEGOTIATED, DRIVER_OK) if self.status & NEEDS_RESET == 0 => {
                self.status |= DRIVER_OK;
                return Effect::Activate;
            }
            (_, FAILED) => self.status |= FAILED,
            _ => {}
        }
        Effect::None
    }

    fn features_are_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn write_features(&mut self, value: u32) {
        if self.step() != DRIVING {
            return;
        }
        match self.driver_features_sel {
            0 => self.accepted = (self.accepted & !0xffff_ffff) | u64::from(value),
            1 => self.accepted = (self.accepted & 0xffff_ffff) | (u64::from(value) << 32),
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        use offset::*;
        if self.step() != NEGOTIATED {
            return;
        }
        let Some(queue) = usize::try_from(self.queue_sel).ok().and_then(|index| self.queues.get_mut(index))
        else {
            return;
        };
        if offset == QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        match offset {
            QUEUE_NUM => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= queue.max_size
                {
                    queue.size = size;
                }
            }
            QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
            QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
            QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// How far the driver has come.
    fn step(&self) -> u32 {
        self.status
    }

    fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.device_type, self.offered, &sizes);
    }

    fn queue(&self) -> Option<&QueuePlan> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }
}

const ACKNOWLEDGED: u32 = ACKNOWLEDGE;
const DRIVING: u32 = ACKNOWLEDGED | DRIVER;
const NEGOTIATED: u32 = DRIVING | FEATURES_OK;

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = (*value & !0xffff_ffff) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = (*value & 0xffff_ffff) | (u64::from(high) << 32);
}

#[cfg(test)]
#[path = "registers_tests.rs"]
mod tests;
