//! Packets: a header of 44 bytes, little-endian, and data.
//!
//! A packet of the guest lies in the readable descriptors of a chain of the transmit queue, one for the guest
//! in the writable descriptors of a chain of the receive queue. How a chain is cut into descriptors is the
//! driver's choice (virtio 1.2, 2.7.4), so neither the header nor the data is taken to be in one piece.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::MS;
use vm_memory::{GuestMemory as _, VolatileSlice};

use crate::virtio::GuestMemory;

/// The length of a header.
pub const HEADER_BYTES: usize = 44;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// The only kind of socket there is.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for (virtio 1.2, 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses or ends a connection at once.
    Reset = 3,
    /// Says that the sender will not receive, or not send, any more; see [`SHUTDOWN_RECEIVE`].
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Only tells how much has been consumed, as every packet does.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(value: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|op| *op as u16 == value)
    }
}

/// A flag of [`Op::Shutdown`]: the sender will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;

/// A flag of [`Op::Shutdown`]: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's context id.
    pub src_cid: u64,
    /// The receiver's context id.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data.
    pub len: u32,
    /// The kind of socket.
    pub kind: u16,
    /// What it is for, as on the wire.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// The size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// How many bytes of this connection the sender has taken out of that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The operation, if it is one.
    pub fn op(&self) -> Option<Op> {
        Op::from_wire(self.op)
    }

    /// A header from the wire.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut wire = Wire { bytes: bytes.iter() };
        Self {
            src_cid: u64::from_le_bytes(wire.take()),
            dst_cid: u64::from_le_bytes(wire.take()),
            src_port: u32::from_le_bytes(wire.take()),
            dst_port: u32::from_le_bytes(wire.take()),
            len: u32::from_le_bytes(wire.take()),
            kind: u16::from_le_bytes(wire.take()),
            op: u16::from_le_bytes(wire.take()),
            flags: u32::from_le_bytes(wire.take()),
            buf_alloc: u32::from_le_bytes(wire.take()),
            fwd_cnt: u32::from_le_bytes(wire.take()),
        }
    }

    /// A header for the wire.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

/// Takes fields off the front of a header.
struct Wire<'a> {
    bytes: std::slice::Iter<'a, u8>,
}

impl Wire<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.bytes.next().copied().unwrap_or(0))
    }
}

/// A piece of guest memory.
pub type Slice<'a> = VolatileSlice<'a, MS<'a, GuestMemory>>;

/// The pieces of guest memory that a chain names, all for reading or all for writing.
pub struct Buffers<'a> {
    slices: Vec<Slice<'a>>,
}

/// A chain that cannot hold a packet: descriptors of the wrong direction, or outside guest memory.
#[derive(Debug, PartialEq, Eq)]
pub struct BadChain;

/// What the device does with a chain.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// It reads a packet of the guest.
    FromGuest,
    /// It writes a packet for the guest.
    ToGuest,
}

impl<'a> Buffers<'a> {
    /// The memory of a chain.
    pub fn new<M>(
        memory: &'a GuestMemory,
        chain: DescriptorChain<M>,
        direction: Direction,
    ) -> Result<Self, BadChain>
    where
        M: Deref,
        M::Target: vm_memory::GuestMemory,
    {
        let mut slices = Vec::with_capacity(2);
        for descriptor in chain {
            if descriptor.is_write_only() != (direction == Direction::ToGuest) {
                return Err(BadChain);
            }
            let slice =
                memory.get_slice(descriptor.addr(), descriptor.len() as usize).map_err(|_| BadChain)?;
            if !slice.is_empty() {
                slices.push(slice);
            }
        }
        Ok(Self { slices })
    }

    /// The pieces, in order, none empty.
    pub fn slices(&self) -> &[Slice<'a>] {
        &self.slices
    }

    /// Bytes in all of them.
    pub fn len(&self) -> usize {
        self.slices.iter().map(|slice| slice.len()).fold(0, usize::saturating_add)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Takes a header off the front.
    pub fn read_header(&mut self) -> Result<Header, BadChain> {
        let mut bytes = [0; HEADER_BYTES];
        let copied = self.copy_to(&mut bytes);
        if copied < HEADER_BYTES {
            return Err(BadChain);
        }
        self.skip(HEADER_BYTES);
        Ok(Header::from_bytes(&bytes))
    }

    /// What is left for data behind a header.
    pub fn behind_header(&self) -> Self {
        let mut data = Self { slices: self.slices.clone() };
        data.skip(HEADER_BYTES);
        data
    }

    /// Writes a header at the front.
    pub fn write_header(&self, header: Header) {
        let bytes = header.to_bytes();
        let mut rest = bytes.as_slice();
        for slice in &self.slices {
            let (part, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(part);
            rest = later;
        }
    }

    /// Copies from the front into `to`; returns how many bytes there were.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in &self.slices {
            let Some(rest) = to.get_mut(copied..).filter(|rest| !rest.is_empty()) else { break };
            copied += slice.copy_to(rest);
        }
        copied
    }

    /// Drops bytes from the front.
    pub fn skip(&mut self, mut bytes: usize) {
        let mut whole = 0;
        for slice in &mut self.slices {
            if slice.len() <= bytes {
                bytes -= slice.len();
                whole += 1;
            } else {
                if let Ok(rest) = slice.offset(bytes) {
                    *slice = rest;
                }
                break;
            }
        }
        self.slices.drain(..whole);
    }

    /// Drops all but so many bytes from the front.
    pub fn truncate(&mut self, mut bytes: usize) {
        let mut kept = 0;
        for slice in &mut self.slices {
            if bytes == 0 {
                break;
            }
            if slice.len() > bytes
                && let Ok(part) = slice.subslice(0, bytes)
            {
                *slice = part;
            }
            bytes -= slice.len();
            kept += 1;
        }
        self.slices.truncate(kept);
    }
}
