//! virtio-net (virtio 1.2, 5.1) on a tap of the host.
//!
//! Queue 0 takes frames to the guest, queue 1 frames from it; each frame has a header in front that says what
//! is left to do for it: compute a checksum, cut it into segments. The tap speaks the same header.
//!
//! ```text
//!  guest ── queue 1 ──► tx ──► tap ──► host's network
//!        ◄─ queue 0 ─── rx ◄──
//! ```
//!
//! One event descriptor of ours stands beside the tap's: a device serves a bounded number of frames at a time
//! and then calls itself again by it, so that a flood holds up neither the other devices of its thread nor a
//! vCPU that wants its registers.

mod rx;
pub mod tap;
mod tx;
mod used;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::read_config_space;
use crate::config;
use crate::virtio::chain::{Indirect, Limits};
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};
use rx::{Merging, Receiver};
use tap::{Tap, TapError, UdpSegmentation};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE; 2];

/// The largest frame with its header: 64 KiB to be segmented, an Ethernet header, and the 12 bytes of ours
/// (virtio 1.2, 5.1.6.3.1).
pub const MAX_FRAME_BYTES: usize = 65_562;

/// The most bytes of a chain. Receive buffers of drivers that do not merge them are a little longer than the
/// largest frame.
const MAX_CHAIN_BYTES: u64 = 128 << 10;

/// The frames that are served, each way, before the device's thread looks after other things.
const FRAMES_AT_A_TIME: u32 = 256;

/// What a guest may leave to the host, or take from it, without UDP.
const OFFLOAD_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// The same for UDP.
const UDP_FEATURES: u64 =
    1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// A network interface of the guest.
#[derive(Debug)]
pub struct Net {
    name: String,
    mac: config::MacAddress,
    tap: Tap,
    again: EventFd,
    indirect: Indirect,
    receiver: Receiver,
    sent: FrameCounters,
}

/// Why an interface could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Its tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// No event descriptor could be had.
    #[error("cannot make an event descriptor for a network interface: {0}")]
    Event(#[source] io::Error),
}

/// Frames of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounters {
    frames: u64,
    bytes: u64,
    dropped: u64,
}

impl FrameCounters {
    /// Counts a frame; its header is not part of it.
    fn count(&mut self, bytes_with_header: usize) {
        self.frames += 1;
        self.bytes += bytes_with_header.saturating_sub(tap::HEADER_BYTES) as u64;
    }
}

/// Frames that may still be served at a time.
#[derive(Debug)]
pub struct Budget(u32);

impl Budget {
    fn take(&mut self) -> bool {
        let left = self.0 > 0;
        self.0 = self.0.saturating_sub(1);
        left
    }
}

/// How far a queue was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// As far as it goes; an event or a notification says when there is more.
    All,
    /// Until the budget was spent: there may be more.
    BudgetSpent,
}

impl Net {
    /// Attaches the interface with this number to its tap; its name is `net<index>`.
    pub fn open(index: usize, net: &config::Net) -> Result<Self, NetError> {
        Ok(Self {
            name: format!("net{index}"),
            mac: net.mac,
            tap: Tap::take(&net.tap)?,
            again: EventFd::new(EFD_NONBLOCK).map_err(NetError::Event)?,
            indirect: Indirect::Refused,
            receiver: Receiver::new(),
            sent: FrameCounters::default(),
        })
    }

    /// Serves one queue; calls itself again if there may be more.
    fn run(
        &mut self,
        index: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(Signals::NONE);
        };
        let max_buffers = QUEUE_SIZE.into();
        let limits =
            Limits { queue: index, max_bytes: MAX_CHAIN_BYTES, max_buffers, indirect: self.indirect };
        let mut budget = Budget(FRAMES_AT_A_TIME);
        let (signals, drained) = match index {
            RECEIVE => self.receiver.drain(&self.tap, queue, memory, &limits, &mut budget)?,
            _ => tx::drain(&self.tap, queue, memory, &limits, &mut self.sent, &mut budget)?,
        };
        if drained == Drained::BudgetSpent
            && let Err(error) = self.again.write(1)
        {
            tracing::warn!(device = %self.name, %error, "cannot call the device again");
        }
        Ok(signals)
    }

    fn set_offloads(&self, features: u64) {
        if let Err(error) = self.tap.set_offloads(features) {
            tracing::warn!(device = %self.name, %error, "the guest does without");
        }
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | OFFLOAD_FEATURES;
        always
            | match self.tap.udp_segmentation() {
                UdpSegmentation::Supported => UDP_FEATURES,
                UdpSegmentation::Missing => 0,
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.mac.0, offset, data);
    }

    fn activate(&mut self, features: u64) {
        let accepted = |bit: u32| features & (1 << bit) != 0;
        self.indirect =
            if accepted(VIRTIO_RING_F_INDIRECT_DESC) { Indirect::Allowed } else { Indirect::Refused };
        self.receiver.merging =
            if accepted(VIRTIO_NET_F_MRG_RXBUF) { Merging::Allowed } else { Merging::Refused };
        self.set_offloads(features);
    }

    fn reset(&mut self) {
        self.receiver.reset();
        self.set_offloads(0);
    }

    fn notified(
        &mut self,
        queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.run(queue, queues, memory)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.tap.as_raw_fd(), self.again.as_raw_fd()]
    }

    /// The tap has frames or takes frames again, or the budget was spent: in all cases both ways go on.
    fn ready(
        &mut self,
        _fd: RawFd,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let mut signals = self.run(TRANSMIT, queues, memory)?;
        signals |= self.run(RECEIVE, queues, memory)?;
        Ok(signals)
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let (received, sent) = (self.receiver.counters, self.sent);
        [
            ("rx_frames", received.frames),
            ("rx_bytes", received.bytes),
            ("rx_dropped", received.dropped),
            ("tx_frames", sent.frames),
            ("tx_bytes", sent.bytes),
            ("tx_dropped", sent.dropped),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
    }
}

#[cfg(test)]
mod tests;
