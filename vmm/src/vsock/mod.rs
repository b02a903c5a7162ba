//! The vsock device: sockets between programs of the guest and programs of the host.
//!
//! # The protocol
//!
//! A vsock address is a context id and a port; the host is 2, the guest is what it was given. The device
//! carries packets (virtio 1.2, 5.10), each a header and data, over queue 0 to the guest and queue 1 from it;
//! queue 2 is for events that only a migration has. A stream connection is opened by `REQUEST` and `RESPONSE`,
//! carries data under flow control by credit ([`credit`]), and is ended in each direction by `SHUTDOWN`, as a
//! whole by `RST` ([`connection`]).
//!
//! # The host's side
//!
//! The host needs no vsock of its own. With the device's socket at `<path>`,
//!
//! - a guest program that connects to port P of the host reaches the program that listens at `<path>_P`;
//! - a host program that wants port P of the guest connects to `<path>`, writes `CONNECT P\n`, and reads
//!   `OK <its own port>\n` when a program of the guest has accepted.
//!
//! # Limits
//!
//! The guest can open [`mux::CONNECTIONS_MAX`] connections, each of which holds at most 256 KiB of its data
//! here. Whatever it sends that fits no connection is answered by `RST`. Data moves between the socket and the
//! guest's memory directly; it is copied only when the host's program is slower than the guest's.

mod connection;
mod credit;
mod mux;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use crate::virtio::chain::{self, Chain, Indirect, Limits};
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice, rate};
use mux::Mux;
use packet::{HEADER_BYTES, Header};

/// The queue of packets for the guest.
const TO_GUEST: usize = 0;

/// The queue of packets of the guest.
const FROM_GUEST: usize = 1;

/// The most bytes of a packet. Linux makes none of more than 64 KiB.
const PACKET_BYTES_MAX: u64 = 1 << 20;

/// The size of each queue.
const QUEUE_SIZE: u16 = 256;

/// The most buffers of a chain, in the largest ring that a transport offers.
const QUEUE_SIZE_MAX: usize = 1024;

/// What the two queues accept of a driver with these features.
fn limits(features: u64) -> [Limits; 2] {
    let indirect = match features & (1 << VIRTIO_RING_F_INDIRECT_DESC) {
        0 => Indirect::Refused,
        _ => Indirect::Allowed,
    };
    [TO_GUEST, FROM_GUEST].map(|queue| Limits {
        queue,
        max_bytes: PACKET_BYTES_MAX,
        max_buffers: QUEUE_SIZE_MAX,
        indirect,
    })
}

/// How many packets go one way before the other way has its turn.
const TURN: usize = 64;

/// The vsock device.
pub struct Vsock {
    cid: u64,
    mux: Mux,
    limits: [Limits; 2],
}

/// How a turn ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// There was nothing more to do.
    Done,
    /// It was the other way's turn.
    More,
}

impl Vsock {
    /// A device for the guest `cid`. Host programs connect to `listener`; those that listen for port P are at
    /// `<dial>_P`, a path that is looked up when the guest connects.
    pub fn new(cid: u32, listener: UnixListener, dial: PathBuf) -> io::Result<Self> {
        let cid = u64::from(cid);
        Ok(Self { cid, mux: Mux::new(cid, dial, listener)?, limits: limits(0) })
    }

    /// Moves packets both ways until neither goes on.
    fn pump(&mut self, queues: &mut [&mut Queue], memory: &GuestMemory) -> Result<Signals, BrokenRing> {
        let [to_guest, from_guest, ..] = queues else { return Ok(Signals::NONE) };
        let mut signals = Signals::NONE;
        loop {
            let sent = self.take_packets(from_guest, memory)?;
            let received = self.give_packets(to_guest, memory)?;
            if (sent, received) == (Turn::Done, Turn::Done) {
                break;
            }
            self.mux.poll();
        }
        for (queue, limits) in [to_guest, from_guest].into_iter().zip(&self.limits) {
            if chain::wants_signal(queue, memory, limits)? {
                signals.add(limits.queue);
            }
        }
        Ok(signals)
    }

    /// Takes packets of the guest.
    fn take_packets(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<Turn, BrokenRing> {
        let [_, limits] = self.limits;
        for _ in 0..TURN {
            if !self.mux.accepts_packets() {
                // Resets wait for buffers of the guest; it notifies the other queue when it adds some.
                return Ok(Turn::Done);
            }
            let Some(chain) = next_chain(queue, memory, &limits)? else { return Ok(Turn::Done) };
            let head = chain.head();
            let mut packet = chain.readable;
            rate::spend_bytes(packet.len() as u64);
            match Header::take(&mut packet) {
                Ok(header) => self.mux.packet_of_guest(&header, packet),
                Err(error) => tracing::debug!(%error, "dropped a chain that holds no packet"),
            }
            chain::complete(queue, memory, &limits, head, 0)?;
        }
        Ok(Turn::More)
    }

    /// Gives packets to the guest.
    fn give_packets(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<Turn, BrokenRing> {
        let [limits, _] = self.limits;
        for _ in 0..TURN {
            if !self.mux.has_packet() {
                return Ok(Turn::Done);
            }
            let Some(chain) = next_chain(queue, memory, &limits)? else { return Ok(Turn::Done) };
            let head = chain.head();
            let mut room = chain.writable;
            let written = match room.split_first(HEADER_BYTES) {
                Err(error) => {
                    tracing::debug!(%error, "returned a buffer that has no room for a packet");
                    0
                }
                Ok(mut place) => match self.mux.packet_for_guest(&room) {
                    Some(header) if place.write(&header.to_bytes()).is_ok() => {
                        HEADER_BYTES as u32 + header.len
                    }
                    Some(_) => 0,
                    None => {
                        chain::put_back(queue);
                        return Ok(Turn::Done);
                    }
                },
            };
            chain::complete(queue, memory, &limits, head, written)?;
        }
        Ok(Turn::More)
    }
}

/// The next chain; when there is none, the guest notifies the queue when it adds one.
fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    limits: &Limits,
) -> Result<Option<Chain<'m>>, BrokenRing> {
    if let Some(chain) = chain::next_chain(queue, memory, limits)? {
        return Ok(Some(chain));
    }
    if chain::enable_notification(queue, memory, limits)? {
        return chain::next_chain(queue, memory, limits);
    }
    Ok(None)
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        "vsock"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.cid.to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(index));
            *byte = at.and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, features: u64) {
        self.limits = limits(features);
    }

    fn reset(&mut self) {
        self.mux.clear();
    }

    fn notified(
        &mut self,
        _queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.pump(queues, memory)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.mux.event_fd()]
    }

    fn ready(
        &mut self,
        _fd: RawFd,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.mux.poll();
        self.pump(queues, memory)
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        self.mux.statistics()
    }
}
