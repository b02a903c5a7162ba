//! virtio-balloon (virtio 1.2, 5.5): the guest gives memory back to the host.
//!
//! Two ways. By *free-page reporting* the guest's kernel offers ranges that it has free, and takes them back
//! once the device has answered; it may use them again at any time, with whatever they then hold. By
//! *inflating* it hands over pages that it promises not to touch, up to a target that the host sets; the
//! target here is always 0, since reporting does the work without taking memory away from the guest.
//!
//! ```text
//!  queue 0  inflate    numbers of pages of 4 KiB, 32 bits each
//!  queue 1  deflate    the same, taken back: the host gives memory again at the first touch
//!  queue 2  reporting  the free ranges themselves, as buffers to be written
//! ```
//!
//! A driver counts its queues without those of features that were not negotiated (virtio 1.2, 5.5.2 numbers
//! reporting 4; Linux over virtio-mmio leaves no gaps). Neither the statistics nor the free-page-hint queue is
//! offered, so that reporting is queue 2 for every driver that has it.
//!
//! A guest that fills free pages with a pattern (`VIRTIO_BALLOON_F_PAGE_POISON`) expects to find it again.
//! Memory that the host gave anew is all zeroes: with any other pattern nothing is released.

mod release;

use std::collections::BTreeMap;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::read_config_space;
use crate::virtio::chain::{Chain, Indirect, Limits, Served, serve};
use crate::virtio::io::Buffers;
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};
use release::release;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;

/// The queues' size: Linux reports 32 ranges at a time and does without reporting where they do not fit.
const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE; 3];

/// The most bytes of a list of page numbers: 4,096 pages, where Linux hands over 256 at a time.
const MAX_LIST_BYTES: u64 = 16 << 10;

/// The most bytes of the ranges that are reported together: Linux reports at most 32 of 4 MiB.
const MAX_REPORT_BYTES: u64 = 1 << 30;

/// The bytes of a page in the lists, whatever the guest's pages are.
const PAGE_BYTES: u64 = 4096;

/// Feature bits (virtio 1.2, 5.5.3).
const F_PAGE_POISON: u32 = 4;
const F_PAGE_REPORTING: u32 = 5;

/// Fields of the configuration space, which a driver may read (all) and write (the last two).
const TARGET_PAGES: u32 = 0;
const CONFIG_BYTES: usize = 16;
const ACTUAL_OFFSET: u64 = 4;
const POISON_OFFSET: u64 = 12;

/// The balloon of a guest whose memory is private and anonymous.
///
/// With memory that is shared or has a file behind it nothing would break, but nothing would be given back
/// either.
#[derive(Debug)]
pub struct Balloon {
    /// Pages that the driver says it has handed over.
    actual: u32,
    /// What the driver says that free pages are filled with.
    poison: u32,
    features: u64,
    counters: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    /// Memory released because it was reported free, in bytes.
    reported_bytes: u64,
    /// Memory released because it was handed over, in bytes.
    inflated_bytes: u64,
    /// Pages handed over that the guest does not have.
    refused_pages: u64,
}

impl Balloon {
    /// A balloon with nothing in it.
    #[expect(clippy::new_without_default, reason = "a device is made on purpose")]
    pub fn new() -> Self {
        Self { actual: 0, poison: 0, features: 0, counters: Counters::default() }
    }

    /// The memory that the guest has reported free and the host has taken, in bytes.
    pub fn reported_bytes(&self) -> u64 {
        self.counters.reported_bytes
    }

    /// Takes pages that the guest hands over.
    fn inflate(&mut self, pages: &mut Buffers<'_>, memory: &GuestMemory) {
        for run in Runs::of(pages) {
            let start = GuestAddress(u64::from(run.first) * PAGE_BYTES);
            let released = usize::try_from(run.count * PAGE_BYTES)
                .ok()
                .and_then(|bytes| memory.get_slice(start, bytes).ok())
                .map(|slice| release(&slice));
            match released {
                Some(bytes) => self.counters.inflated_bytes += bytes,
                None => self.counters.refused_pages += run.count,
            }
        }
    }

    /// Takes the memory of ranges that are free.
    fn report(&mut self, chain: &Chain<'_>) {
        let poisoned = self.features & (1 << F_PAGE_POISON) != 0 && self.poison != 0;
        if !poisoned {
            self.counters.reported_bytes += chain.writable.slices().map(release).sum::<u64>();
        }
    }
}

/// Pages that follow each other.
struct Run {
    first: u32,
    count: u64,
}

/// The runs of a list of page numbers.
struct Runs<'b, 'm> {
    list: &'b mut Buffers<'m>,
    /// The number that was read and starts the next run.
    next: Option<u32>,
}

impl<'b, 'm> Runs<'b, 'm> {
    fn of(list: &'b mut Buffers<'m>) -> Self {
        let next = next_page(list);
        Self { list, next }
    }
}

impl Iterator for Runs<'_, '_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let mut run = Run { first: self.next?, count: 1 };
        loop {
            self.next = next_page(self.list);
            match self.next {
                Some(page) if u64::from(page) == u64::from(run.first) + run.count => run.count += 1,
                _ => return Some(run),
            }
        }
    }
}

fn next_page(list: &mut Buffers<'_>) -> Option<u32> {
    let mut number = [0; 4];
    list.read(&mut number).ok()?;
    Some(u32::from_le_bytes(number))
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        "balloon"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << F_PAGE_POISON | 1 << F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_BYTES];
        let fields = [TARGET_PAGES, self.actual, 0, self.poison].map(u32::to_le_bytes);
        for (to, from) in space.iter_mut().zip(fields.as_flattened()) {
            *to = *from;
        }
        read_config_space(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        match offset {
            ACTUAL_OFFSET => self.actual = u32::from_le_bytes(bytes),
            POISON_OFFSET => self.poison = u32::from_le_bytes(bytes),
            _ => {}
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn reset(&mut self) {
        self.actual = 0;
        self.poison = 0;
        self.features = 0;
    }

    fn notified(
        &mut self,
        queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let Some(ring) = queues.get_mut(queue) else { return Ok(Signals::NONE) };
        let max_bytes = if queue == REPORTING { MAX_REPORT_BYTES } else { MAX_LIST_BYTES };
        let max_buffers = QUEUE_SIZE.into();
        let limits = Limits { queue, max_bytes, max_buffers, indirect: Indirect::Refused };
        serve(ring, memory, &limits, |chain| {
            match queue {
                INFLATE => self.inflate(&mut chain.readable, memory),
                REPORTING => self.report(chain),
                // Memory that is taken back comes at the first touch.
                DEFLATE => {}
                _ => {}
            }
            Ok(Served::Done(0))
        })
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let Counters { reported_bytes, inflated_bytes, refused_pages } = self.counters;
        [
            ("reported_bytes", reported_bytes),
            ("inflated_bytes", inflated_bytes),
            ("refused_pages", refused_pages),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
    }
}

#[cfg(test)]
mod tests;
