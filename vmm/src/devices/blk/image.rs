//! The file behind a disk, and the only ways to touch it.
//!
//! A disk is a sequence of sectors of 512 bytes. A [`Span`] is a part of one that was checked to lie inside
//! it; nothing is read or written but by a span, so a request cannot reach past the disk or make it grow.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;
use sandbox_vmm_api::DiskConfig;

use crate::virtio::io::Buffers;

/// The bytes of a sector, the unit of all of virtio-blk whatever the disk's own is.
pub const SECTOR_BYTES: u64 = 512;

/// The bytes written at a time where zeroes have to be written one by one.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It could not be opened.
    #[error("cannot open disk {path} {access}: {error}")]
    Open {
        /// The image.
        path: PathBuf,
        /// How.
        access: Access,
        /// Why.
        error: io::Error,
    },
    /// It is a directory, a socket or the like.
    #[error("disk {0} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Another process uses it in a way that does not go together with this one.
    #[error(
        "disk {path} is in use by another machine: a disk is either written by one or only read by several"
    )]
    Busy {
        /// The image.
        path: PathBuf,
    },
    /// It could not be locked or measured.
    #[error("cannot {step} disk {path}: {error}")]
    Inspect {
        /// What was done.
        step: &'static str,
        /// The image.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It has no whole number of sectors.
    #[error(
        "disk {path} has {bytes} bytes: it must have a multiple of {SECTOR_BYTES}, and at least one sector; \
         `truncate -s %{SECTOR_BYTES} FILE` pads it with zeroes"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its bytes.
        bytes: u64,
    },
}

/// What may be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing but reading: the file itself is open for reading only.
    ReadOnly,
    /// Reading and writing.
    Writable,
}

impl std::fmt::Display for Access {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::ReadOnly => "for reading",
            Self::Writable => "for writing",
        })
    }
}

/// What becomes of the space under zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// It stays allocated.
    Keep,
    /// It may be given back to the host's file system.
    MayFree,
}

/// A raw disk image, open.
#[derive(Debug)]
pub struct Image {
    file: File,
    access: Access,
    sectors: u64,
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A part of an image that lies inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    offset: u64,
    bytes: u64,
}

impl Image {
    /// Opens an image, and holds it against other machines for as long as it is open.
    ///
    /// Its format is raw, whatever its content looks like.
    pub fn open(disk: &DiskConfig) -> Result<Self, ImageError> {
        let path = || disk.path.clone();
        let access = if disk.read_only { Access::ReadOnly } else { Access::Writable };
        let inspect = |step| move |error: io::Error| ImageError::Inspect { step, path: path(), error };
        // Without O_NONBLOCK the opening of a fifo waits for its other end.
        let mut file = OpenOptions::new()
            .read(true)
            .write(access == Access::Writable)
            .custom_flags(libc::O_NONBLOCK)
            .open(&disk.path)
            .map_err(|error| ImageError::Open { path: path(), access, error })?;
        let kind = file.metadata().map_err(inspect("look at"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind(path()));
        }
        let lock = match access {
            Access::ReadOnly => FlockOperation::NonBlockingLockShared,
            Access::Writable => FlockOperation::NonBlockingLockExclusive,
        };
        flock(&file, lock).map_err(|errno| match errno {
            Errno::WOULDBLOCK => ImageError::Busy { path: path() },
            _ => inspect("lock")(errno.into()),
        })?;
        // The metadata of a block device has no length.
        let bytes = file.seek(SeekFrom::End(0)).map_err(inspect("measure"))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Size { path: path(), bytes });
        }
        Ok(Self { file, access, sectors: bytes / SECTOR_BYTES })
    }

    /// What may be done with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its sectors, as it was opened.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// So many bytes from a sector on, if they are whole sectors of the image.
    pub fn span(&self, sector: u64, bytes: u64) -> Option<Span> {
        let end = sector.checked_add(bytes / SECTOR_BYTES)?;
        let inside = bytes.is_multiple_of(SECTOR_BYTES) && end <= self.sectors;
        inside.then(|| Span { offset: sector * SECTOR_BYTES, bytes })
    }

    /// Fills buffers, as long as the span is, with what it holds.
    pub fn read(&self, span: Span, data: &mut Buffers<'_>) -> io::Result<()> {
        let mut offset = span.offset;
        while !data.is_empty() {
            match data.read_from_at(self.file.as_fd(), offset)? {
                // Somebody has cut the file short.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    /// Writes buffers, as long as the span is, to it.
    pub fn write(&self, span: Span, data: &mut Buffers<'_>) -> io::Result<()> {
        let mut offset = span.offset;
        while !data.is_empty() {
            match data.write_to_at(self.file.as_fd(), offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => offset += count as u64,
            }
        }
        Ok(())
    }

    /// Returns when all that was written is on the medium.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a span back; what is read there afterwards is zeroes.
    pub fn discard(&self, span: Span) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, punch, span.offset, span.bytes)?)
    }

    /// Makes a span zeroes.
    pub fn write_zeroes(&self, span: Span, space: Space) -> io::Result<()> {
        if space == Space::MayFree && self.discard(span).is_ok() {
            return Ok(());
        }
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, zero, span.offset, span.bytes) {
            Err(Errno::OPNOTSUPP | Errno::INVAL) => self.write_zeroes_by_hand(span),
            other => Ok(other?),
        }
    }

    fn write_zeroes_by_hand(&self, span: Span) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let mut done = 0;
        while done < span.bytes {
            let count = usize::try_from(span.bytes - done).unwrap_or(usize::MAX).min(ZEROES.len());
            self.file.write_all_at(ZEROES.get(..count).unwrap_or(&ZEROES), span.offset + done)?;
            done += count as u64;
        }
        Ok(())
    }
}
