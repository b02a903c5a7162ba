//! Packets: a header of 44 bytes, little-endian, and data.
//!
//! A packet of the guest lies in the readable buffers of a chain of the transmit queue, one for the guest in the
//! writable buffers of a chain of the receive queue. How a chain is cut into buffers is the driver's choice
//! (virtio 1.2, 2.7.4), so neither the header nor the data is taken to be in one piece.

use crate::virtio::io::{Buffers, TooShort};

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

    /// Takes the header off the front of a packet.
    pub fn take(packet: &mut Buffers<'_>) -> Result<Self, TooShort> {
        let mut bytes = [0; HEADER_BYTES];
        packet.read(&mut bytes)?;
        Ok(Self::from_bytes(&bytes))
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
