//! virtio-rng (virtio 1.2, 5.4): the guest offers buffers, the host's random number generator fills them.

use std::collections::BTreeMap;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;

use super::chain::{Indirect, Limits, Served, serve};
use super::{BrokenRing, GuestMemory, Signals, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [16];

/// The most bytes that a request may ask for, however many buffers it has.
const MAX_REQUEST_BYTES: u64 = 64 << 10;

/// The bytes that are filled at a time, and at most per request: drivers take what they get, and no request
/// makes the host work for long.
const FILL_BYTES: usize = 256;

const LIMITS: Limits =
    Limits { queue: 0, max_bytes: MAX_REQUEST_BYTES, max_buffers: 16, indirect: Indirect::Refused };

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    bytes: u64,
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        "rng"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn notified(
        &mut self,
        _queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let [queue] = queues else { return Ok(Signals::NONE) };
        serve(queue, memory, &LIMITS, |chain| {
            let mut random = [0; FILL_BYTES];
            let wanted = chain.writable.len().min(FILL_BYTES);
            let filled =
                random.get_mut(..wanted).and_then(|part| getrandom(part, GetRandomFlags::empty()).ok());
            let written = filled.unwrap_or(0).min(wanted);
            if let Some(part) = random.get(..written) {
                chain.writable.write(part).map_err(|why| BrokenRing { queue: 0, reason: why.to_string() })?;
            }
            self.bytes += written as u64;
            Ok(Served::Done(written as u32))
        })
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("bytes".to_owned(), self.bytes)])
    }
}
