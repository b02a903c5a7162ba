//! What a driver asks of a disk (virtio 1.2, 5.2.6).
//!
//! ```text
//!  readable:  type (4)  reserved (4)  sector (8)   data of a write, or segments
//!  writable:  data of a read, or the identifier    status (1)
//! ```
//!
//! Where one buffer ends and the next begins means nothing. The status byte is the last that the device may
//! write; it is split off first, so that every request that has one gets an answer.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::image::{Access, Image, SECTOR_BYTES, Space, Span};
use crate::virtio::io::Buffers;

/// The bytes of a request's header.
const HEADER_BYTES: usize = 16;

/// The bytes of a segment of a discard or write-zeroes request: sector (8), sectors (4), flags (4).
const SEGMENT_BYTES: usize = 16;

/// The most sectors that one request may discard (1 GiB).
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// The most sectors that one request may make zeroes (16 MiB): the host may have to write them one by one.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;

/// The identifier of a disk, as long as the driver reads it.
pub type DiskId = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Malformed, out of range, or failed.
    IoError,
    /// Nothing that this device does.
    Unsupported,
}

impl Status {
    /// The status byte.
    pub fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// A request that fits the disk.
#[derive(Debug)]
pub enum Request<'m> {
    /// Read a span.
    Read(Span, Buffers<'m>),
    /// Write a span.
    Write(Span, Buffers<'m>),
    /// Make everything written so far durable.
    Flush,
    /// Tell the disk's identifier.
    Identify(Buffers<'m>),
    /// Give a span's space back.
    Discard(Span),
    /// Make a span zeroes.
    WriteZeroes(Span, Space),
}

impl<'m> Request<'m> {
    /// Reads a request; `writable` is without the status byte.
    pub fn parse(image: &Image, mut readable: Buffers<'m>, writable: Buffers<'m>) -> Result<Self, Status> {
        let mut header = [0; HEADER_BYTES];
        readable.read(&mut header).map_err(|_| Status::IoError)?;
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let writes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
        if writes && image.access() == Access::ReadOnly {
            return Err(Status::IoError);
        }
        match kind {
            VIRTIO_BLK_T_IN => Ok(Self::Read(span_of(image, sector, &writable)?, only(writable, &readable)?)),
            VIRTIO_BLK_T_OUT => {
                Ok(Self::Write(span_of(image, sector, &readable)?, only(readable, &writable)?))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID if writable.len() >= size_of::<DiskId>() => Ok(Self::Identify(writable)),
            VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
            VIRTIO_BLK_T_DISCARD => match segment(image, readable, MAX_DISCARD_SECTORS)? {
                (span, 0) => Ok(Self::Discard(span)),
                _ => Err(Status::Unsupported),
            },
            VIRTIO_BLK_T_WRITE_ZEROES => match segment(image, readable, MAX_WRITE_ZEROES_SECTORS)? {
                (span, 0) => Ok(Self::WriteZeroes(span, Space::Keep)),
                (span, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => Ok(Self::WriteZeroes(span, Space::MayFree)),
                _ => Err(Status::Unsupported),
            },
            _ => Err(Status::Unsupported),
        }
    }
}

fn span_of(image: &Image, sector: u64, data: &Buffers<'_>) -> Result<Span, Status> {
    image.span(sector, data.len() as u64).ok_or(Status::IoError)
}

/// The data of a request that has none in the other direction.
fn only<'m>(data: Buffers<'m>, other: &Buffers<'_>) -> Result<Buffers<'m>, Status> {
    if other.is_empty() { Ok(data) } else { Err(Status::IoError) }
}

/// The one segment of a request, and its flags.
fn segment(image: &Image, mut data: Buffers<'_>, most: u32) -> Result<(Span, u32), Status> {
    let mut bytes = [0; SEGMENT_BYTES];
    data.read(&mut bytes).map_err(|_| Status::IoError)?;
    let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, f0, f1, f2, f3] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([c0, c1, c2, c3]);
    if !data.is_empty() || count == 0 || count > most {
        return Err(Status::IoError);
    }
    let span = image.span(sector, u64::from(count) * SECTOR_BYTES).ok_or(Status::IoError)?;
    Ok((span, u32::from_le_bytes([f0, f1, f2, f3])))
}
