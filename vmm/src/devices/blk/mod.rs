//! virtio-blk (virtio 1.2, 5.2): a raw disk image or block device of the host as a disk of the guest.
//!
//! One queue. Data goes between the file and the guest's buffers without a copy in between. A request that is
//! wrong gets an error status; one without room for a status cannot be answered and breaks the ring. A driver
//! that does not negotiate `VIRTIO_BLK_F_FLUSH` has no way to ask for durability: each of its writes is
//! durable when it is answered.

pub mod image;
mod request;

use std::collections::BTreeMap;
use std::io;

use sandbox_vmm_api::DiskConfig;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use super::read_config_space;
use crate::virtio::chain::{Chain, Indirect, Limits, Served, serve};
use crate::virtio::io::Buffers;
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};
use image::{Access, Image, ImageError};
use request::{DiskId, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Request, Status};

/// The queue's size: the most buffers of a request, header and status included.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];

/// The most data buffers of a request.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The most bytes of a data buffer.
const SIZE_MAX: u32 = 64 << 10;

/// The most bytes of a request, header and status included.
const MAX_REQUEST_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64 + 32;

/// The bytes of the configuration space up to the fields of features that are not offered.
const CONFIG_BYTES: usize = 60;

/// Guests discard whole blocks of this many sectors: the block size of most file systems.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// A disk.
#[derive(Debug)]
pub struct Blk {
    name: String,
    disk: Disk,
    config: [u8; CONFIG_BYTES],
    limits: Limits,
}

/// The disk without its queue.
#[derive(Debug)]
struct Disk {
    image: Image,
    id: DiskId,
    durability: Durability,
    counters: Counters,
}

/// When a write has to be on the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    /// When the driver asks.
    AtFlush,
    /// Before it is answered.
    AtOnce,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
    flushes: u64,
    errors: u64,
}

impl Blk {
    /// Opens the image of the disk with this number; its name is `blk<index>`, its identifier
    /// `sandbox-blk<index>`.
    pub fn open(index: usize, disk: &DiskConfig) -> Result<Self, ImageError> {
        let image = Image::open(disk)?;
        let name = format!("blk{index}");
        let mut id = DiskId::default();
        for (to, from) in id.iter_mut().zip(format!("sandbox-{name}").bytes()) {
            *to = from;
        }
        Ok(Self {
            name,
            config: config_space(&image),
            disk: Disk { image, id, durability: Durability::AtOnce, counters: Counters::default() },
            limits: limits(0),
        })
    }
}

impl Disk {
    /// Answers a request.
    fn serve(&mut self, chain: &mut Chain<'_>) -> Result<Served, BrokenRing> {
        let length = chain.writable.len();
        let (Ok(mut status), Ok(length)) = (chain.writable.split_last(1), u32::try_from(length)) else {
            return Err(BrokenRing { queue: 0, reason: "a request without room for its status".to_owned() });
        };
        let readable = std::mem::take(&mut chain.readable);
        let writable = std::mem::take(&mut chain.writable);
        let answer = match Request::parse(&self.image, readable, writable) {
            Ok(request) => self.carry_out(request),
            Err(refusal) => refusal,
        };
        if answer != Status::Ok {
            self.counters.errors += 1;
        }
        status
            .write(&[answer.byte()])
            .map_err(|error| BrokenRing { queue: 0, reason: format!("status: {error}") })?;
        Ok(Served::Done(length))
    }

    fn carry_out(&mut self, request: Request<'_>) -> Status {
        let result = match request {
            Request::Read(span, mut data) => {
                self.counters.reads += 1;
                self.counters.read_bytes += data.len() as u64;
                self.image.read(span, &mut data)
            }
            Request::Write(span, mut data) => {
                self.counters.writes += 1;
                self.counters.written_bytes += data.len() as u64;
                self.image.write(span, &mut data).and_then(|()| self.make_durable())
            }
            Request::Flush => {
                self.counters.flushes += 1;
                self.image.flush()
            }
            Request::Identify(data) => self.identify(data),
            Request::Discard(span) => self.image.discard(span).and_then(|()| self.make_durable()),
            Request::WriteZeroes(span, space) => {
                self.image.write_zeroes(span, space).and_then(|()| self.make_durable())
            }
        };
        match result {
            Ok(()) => Status::Ok,
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
            Err(error) => {
                tracing::debug!(%error, "a disk request failed");
                Status::IoError
            }
        }
    }

    fn identify(&self, mut data: Buffers<'_>) -> io::Result<()> {
        data.write(&self.id).map_err(|_| io::ErrorKind::InvalidInput.into())
    }

    fn make_durable(&self) -> io::Result<()> {
        match self.durability {
            Durability::AtFlush => Ok(()),
            Durability::AtOnce => self.image.flush(),
        }
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_FLUSH;
        always
            | match self.disk.image.access() {
                Access::ReadOnly => 1 << VIRTIO_BLK_F_RO,
                Access::Writable => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.limits = limits(features);
        self.disk.durability = match features & (1 << VIRTIO_BLK_F_FLUSH) {
            0 => Durability::AtOnce,
            _ => Durability::AtFlush,
        };
    }

    fn reset(&mut self) {}

    fn notified(
        &mut self,
        _queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let [queue] = queues else { return Ok(Signals::NONE) };
        serve(queue, memory, &self.limits, |chain| self.disk.serve(chain))
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let Counters { reads, read_bytes, writes, written_bytes, flushes, errors } = self.disk.counters;
        [
            ("reads", reads),
            ("read_bytes", read_bytes),
            ("writes", writes),
            ("written_bytes", written_bytes),
            ("flushes", flushes),
            ("errors", errors),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
    }
}

fn limits(features: u64) -> Limits {
    let indirect = match features & (1 << VIRTIO_RING_F_INDIRECT_DESC) {
        0 => Indirect::Refused,
        _ => Indirect::Allowed,
    };
    Limits { queue: 0, max_bytes: MAX_REQUEST_BYTES, max_buffers: QUEUE_SIZE.into(), indirect }
}

/// The configuration space (virtio 1.2, 5.2.4); a field that is not set belongs to a feature that is not
/// offered.
fn config_space(image: &Image) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut set = |offset: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    };
    set(0, &image.sectors().to_le_bytes());
    set(8, &SIZE_MAX.to_le_bytes());
    set(12, &SEG_MAX.to_le_bytes());
    if image.access() == Access::Writable {
        set(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        set(40, &1u32.to_le_bytes());
        set(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
        set(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        set(52, &1u32.to_le_bytes());
        set(56, &[1]);
    }
    space
}

#[cfg(test)]
mod tests;
