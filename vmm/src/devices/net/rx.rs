//! Frames from the host to the guest.
//!
//! A frame goes from the tap into the first free buffer of the guest in one call. A driver with mergeable
//! buffers (`VIRTIO_NET_F_MRG_RXBUF`) offers many small ones: what does not fit the first is read, in the same
//! call, into a buffer of ours, and copied on into as many of the guest's as it takes.
//!
//! When the guest has too few buffers for a frame, the frame is held until it offers more; the tap is left
//! alone meanwhile and keeps its frames, up to its own limit. Nothing is lost when both are full: the guest is
//! asked to notify, and only then its ring is looked at a last time. A frame that all the buffers of a full
//! ring cannot hold is dropped, since nothing would ever change.

use std::io;
use std::os::fd::AsFd;

use virtio_queue::{Queue, QueueT};

use super::tap::{HEADER_BYTES, Tap};
use super::used::{Used, complete_together, wants_signal_since};
use super::{Budget, Drained, FrameCounters, MAX_FRAME_BYTES};
use crate::virtio::chain::{Chain, Limits, enable_notification, next_chain, put_back};
use crate::virtio::io::Buffers;
use crate::virtio::{BrokenRing, GuestMemory, Signals};

/// Where the header says how many buffers hold the frame.
const NUM_BUFFERS_OFFSET: usize = 10;

/// Whether a frame may lie in several chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merging {
    /// It may.
    Allowed,
    /// It lies in one, or is dropped.
    Refused,
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    /// Whether frames may be spread over chains.
    pub merging: Merging,
    /// Counters.
    pub counters: FrameCounters,
    /// A frame that waits for buffers.
    held: Option<Vec<u8>>,
    /// What does not fit the first buffer; one byte more than the largest frame, to notice larger ones.
    overflow: Vec<u8>,
}

/// What one step came to.
enum Step {
    /// A frame was delivered or dropped.
    Done,
    /// The guest has no buffers at all.
    NoBuffers,
    /// It has too few for the frame that is held, and notifies when it has more.
    Waiting,
    /// The tap has no more frames.
    NoFrames,
}

/// What was asked of the guest's buffers.
enum Placed {
    /// The frame is with the guest.
    Delivered,
    /// It has too few buffers now.
    TooFew,
    /// All that it could ever offer would be too few.
    Never,
}

impl Receiver {
    /// A receiver without frames.
    pub fn new() -> Self {
        Self {
            merging: Merging::Refused,
            counters: FrameCounters::default(),
            held: None,
            overflow: vec![0; MAX_FRAME_BYTES + 1],
        }
    }

    /// Forgets the frame that waits.
    pub fn reset(&mut self) {
        self.held = None;
    }

    /// Delivers frames until there are no more, or no more buffers, or the budget is spent.
    pub fn drain(
        &mut self,
        tap: &Tap,
        queue: &mut Queue,
        memory: &GuestMemory,
        limits: &Limits,
        budget: &mut Budget,
    ) -> Result<(Signals, Drained), BrokenRing> {
        let broken =
            |error: virtio_queue::Error| BrokenRing { queue: limits.queue, reason: error.to_string() };
        let before = queue.next_used();
        queue.disable_notification(memory).map_err(broken)?;
        let drained = loop {
            if !budget.take() {
                break Drained::BudgetSpent;
            }
            match self.step(tap, queue, memory, limits)? {
                Step::Done => {}
                Step::NoFrames | Step::NoBuffers | Step::Waiting => break Drained::All,
            }
        };
        let mut signals = Signals::NONE;
        if wants_signal_since(before, queue, memory, limits)? {
            signals.add(limits.queue);
        }
        Ok((signals, drained))
    }

    /// Delivers one frame.
    fn step(
        &mut self,
        tap: &Tap,
        queue: &mut Queue,
        memory: &GuestMemory,
        limits: &Limits,
    ) -> Result<Step, BrokenRing> {
        let Some(first) = next_or_notify(queue, memory, limits)? else { return Ok(Step::NoBuffers) };
        if first.writable.len() < HEADER_BYTES {
            let reason = format!("a receive buffer of {} bytes", first.writable.len());
            return Err(BrokenRing { queue: limits.queue, reason });
        }
        match self.held.take() {
            Some(frame) => self.deliver_held(frame, first, queue, memory, limits),
            None => self.deliver_next(tap, first, queue, memory, limits),
        }
    }

    fn deliver_next(
        &mut self,
        tap: &Tap,
        first: Chain<'_>,
        queue: &mut Queue,
        memory: &GuestMemory,
        limits: &Limits,
    ) -> Result<Step, BrokenRing> {
        let room = first.writable.len();
        let count = match first.writable.clone().read_from_and(tap.as_fd(), &mut self.overflow) {
            Ok(count) if (HEADER_BYTES..=MAX_FRAME_BYTES).contains(&count) => count,
            Ok(_) => {
                put_back(queue);
                self.counters.dropped += 1;
                return Ok(Step::Done);
            }
            Err(error) => {
                put_back(queue);
                // Any other error is the tap's end (it is gone or down): its next event says when it is back.
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::debug!(%error, "cannot read from a tap");
                }
                return Ok(Step::NoFrames);
            }
        };
        let rest = self.overflow.get(..count.saturating_sub(room)).unwrap_or_default();
        let mut delivery = Delivery::new(first);
        delivery.fill(count.min(room));
        match delivery.place(rest, self.merging, queue, memory, limits)? {
            Placed::Delivered => self.counters.count(count),
            Placed::Never => self.counters.dropped += 1,
            Placed::TooFew => self.held = Some(delivery.take_back(rest)),
        }
        Ok(if self.held.is_some() { Step::Waiting } else { Step::Done })
    }

    fn deliver_held(
        &mut self,
        frame: Vec<u8>,
        first: Chain<'_>,
        queue: &mut Queue,
        memory: &GuestMemory,
        limits: &Limits,
    ) -> Result<Step, BrokenRing> {
        match Delivery::new(first).place(&frame, self.merging, queue, memory, limits)? {
            Placed::Delivered => self.counters.count(frame.len()),
            Placed::Never => self.counters.dropped += 1,
            Placed::TooFew => {
                self.held = Some(frame);
                return Ok(Step::Waiting);
            }
        }
        Ok(Step::Done)
    }
}

/// A frame on its way into the guest's buffers.
struct Delivery<'m> {
    /// All of the first chain, for the header and for taking the frame back.
    whole: Buffers<'m>,
    /// The chain being filled.
    current: Buffers<'m>,
    /// What was filled, the current one included.
    used: Vec<Used>,
}

impl<'m> Delivery<'m> {
    fn new(first: Chain<'m>) -> Self {
        let used = vec![Used { head: first.head(), written: 0 }];
        Self { whole: first.writable.clone(), current: first.writable, used }
    }

    /// So many bytes are in the current chain.
    fn fill(&mut self, count: usize) {
        self.current.consume(count);
        if let Some(used) = self.used.last_mut() {
            used.written += count as u32;
        }
    }

    /// Puts the rest of the frame into the current chain and as many more as it takes, and hands all back to
    /// the driver; or none of them.
    fn place(
        &mut self,
        mut rest: &[u8],
        merging: Merging,
        queue: &mut Queue,
        memory: &'m GuestMemory,
        limits: &Limits,
    ) -> Result<Placed, BrokenRing> {
        loop {
            let (now, later) = rest.split_at(rest.len().min(self.current.len()));
            self.current
                .clone()
                .write(now)
                .map_err(|error| BrokenRing { queue: limits.queue, reason: error.to_string() })?;
            self.fill(now.len());
            rest = later;
            if rest.is_empty() {
                break;
            }
            if merging == Merging::Refused || self.used.len() >= usize::from(queue.size()) {
                self.put_back(queue);
                return Ok(Placed::Never);
            }
            let Some(next) = next_or_notify(queue, memory, limits)? else {
                self.put_back(queue);
                return Ok(Placed::TooFew);
            };
            self.used.push(Used { head: next.head(), written: 0 });
            self.current = next.writable;
        }
        self.write_count(limits)?;
        complete_together(queue, memory, limits, &self.used)?;
        Ok(Placed::Delivered)
    }

    fn put_back(&self, queue: &mut Queue) {
        for _ in &self.used {
            put_back(queue);
        }
    }

    /// Writes into the header how many chains hold the frame.
    fn write_count(&self, limits: &Limits) -> Result<(), BrokenRing> {
        let mut field = self.whole.clone();
        field.consume(NUM_BUFFERS_OFFSET);
        field
            .write(&(self.used.len() as u16).to_le_bytes())
            .map_err(|error| BrokenRing { queue: limits.queue, reason: error.to_string() })
    }

    /// The frame, of which the rest is here and the beginning in the first chain.
    fn take_back(&mut self, rest: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; self.whole.len()];
        // The buffers are as long as the vector.
        let _ = self.whole.clone().read(&mut frame);
        frame.extend_from_slice(rest);
        frame
    }
}

/// The next chain; or none, and the guest notifies when there is one.
///
/// The guest is to notify of what it offers *next*: so it must be asked while everything that it has offered
/// is taken.
fn next_or_notify<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    limits: &Limits,
) -> Result<Option<Chain<'m>>, BrokenRing> {
    if let Some(chain) = next_chain(queue, memory, limits)? {
        return Ok(Some(chain));
    }
    if enable_notification(queue, memory, limits)? {
        return next_chain(queue, memory, limits);
    }
    Ok(None)
}
