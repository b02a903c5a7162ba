//! Frames from the guest to the host.

use std::io;
use std::os::fd::AsFd;

use virtio_queue::Queue;

use super::tap::{HEADER_BYTES, Tap};
use super::{Budget, Drained, FrameCounters, MAX_FRAME_BYTES};
use crate::virtio::chain::{Chain, Limits, Served, serve};
use crate::virtio::{BrokenRing, GuestMemory, Signals};

/// The bytes of an Ethernet header: a frame has more.
const ETHERNET_HEADER_BYTES: usize = 14;

/// Sends the guest's frames until there are no more, or the tap takes no more, or the budget is spent.
///
/// A tap that takes no more announces itself when it does: the chain stays available until then.
pub fn drain(
    tap: &Tap,
    queue: &mut Queue,
    memory: &GuestMemory,
    limits: &Limits,
    counters: &mut FrameCounters,
    budget: &mut Budget,
) -> Result<(Signals, Drained), BrokenRing> {
    let mut drained = Drained::All;
    let signals = serve(queue, memory, limits, |chain| {
        if !budget.take() {
            drained = Drained::BudgetSpent;
            return Ok(Served::Later);
        }
        Ok(send(tap, chain, counters))
    })?;
    Ok((signals, drained))
}

/// Sends one frame, or drops it when it is none or the tap refuses it.
fn send(tap: &Tap, chain: &mut Chain<'_>, counters: &mut FrameCounters) -> Served {
    let bytes = chain.readable.len();
    if !(HEADER_BYTES + ETHERNET_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&bytes) {
        counters.dropped += 1;
        return Served::Done(0);
    }
    match chain.readable.write_to(tap.as_fd()) {
        Ok(_) => counters.count(bytes),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Served::Later,
        Err(error) => {
            tracing::debug!(%error, "a tap refuses a frame");
            counters.dropped += 1;
        }
    }
    Served::Done(0)
}
