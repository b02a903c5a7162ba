//! What a virtio device is to its transport, and a transport to its device.
//!
//! A device here knows nothing of how it is reached. On the `kvm` machine the virtio-mmio transport owns its
//! queues and calls it from an event loop; on the `qemu` machine the vhost-user back end does. Both speak
//! through [`VirtioDevice`], and both treat [`BrokenRing`] the same way: the device is dead until the guest
//! resets it, and the guest is told so (virtio 1.2, 2.1.2 `DEVICE_NEEDS_RESET`) where the transport can.

pub mod chain;
pub mod event_loop;
pub mod io;
pub mod mmio;
pub mod rate;
pub mod registers;
pub mod rng;

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::Queue;

/// Guest memory. The bitmap type is the one that virtiofsd's reader asks for; without a dirty log it is empty.
pub type GuestMemory = vm_memory::GuestMemoryMmap<BitmapMmapRegion>;

/// The queues whose used ring has grown, one bit each: the guest is owed an interrupt for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals(u32);

impl Signals {
    /// No queue.
    pub const NONE: Self = Self(0);

    /// Adds a queue (0 to 31).
    pub fn add(&mut self, queue: usize) {
        self.0 |= 1u32.checked_shl(queue as u32).unwrap_or(0);
    }

    /// Whether a queue is among them.
    pub fn has(self, queue: usize) -> bool {
        self.0 & 1u32.checked_shl(queue as u32).unwrap_or(0) != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl std::ops::BitOrAssign for Signals {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// The guest broke a ring's rules so that going on makes no sense.
///
/// A request that is merely wrong is answered with the device's own error status; this is for rings that can
/// no longer be followed.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}: {reason}")]
pub struct BrokenRing {
    /// The queue's index.
    pub queue: usize,
    /// What the guest did.
    pub reason: String,
}

/// A virtio device, without its transport.
pub trait VirtioDevice: Send {
    /// Its name in logs and statistics: `vsock`, `fs`, `blk0`.
    fn name(&self) -> &str;

    /// Its virtio device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// The feature bits it offers, those of the transport (`VIRTIO_F_VERSION_1`, `VIRTIO_RING_F_EVENT_IDX`)
    /// included.
    fn features(&self) -> u64;

    /// The largest size of each of its queues; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration space; what lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration space; a device without writable fields ignores it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK with these features, a subset of those offered.
    fn activate(&mut self, features: u64);

    /// The driver has reset the device: forget everything of the driver.
    fn reset(&mut self);

    /// The driver has notified a queue. Called only between `activate` and `reset`.
    fn notified(
        &mut self,
        queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing>;

    /// The descriptors to watch for input, the same for the device's whole life. They are watched
    /// edge-triggered: the device reads until there is no more, or remembers that there was more and goes on
    /// when the queue it waited for is notified.
    fn event_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// One of [`VirtioDevice::event_fds`] has something. Called only between `activate` and `reset`; what
    /// comes outside that time is announced once after `activate`.
    fn ready(
        &mut self,
        _fd: RawFd,
        _queues: &mut [&mut Queue],
        _memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        Ok(Signals::NONE)
    }

    /// Counters for the statistics of the control socket.
    fn statistics(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }
}
