//! Copying the guest's files into its memory, by as many threads as care to help.
//!
//! What is to be copied is cut into pieces, and each thread takes the next one until none is left: so a thread
//! that comes late still takes its share of what is left.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{GuestAddress, GuestMemory as _};

use super::kernel::{place_image, place_kernel};
use super::{BootError, Guest, GuestFile};
use crate::memory::{Extent, Layout};
use crate::virtio::GuestMemory;
use crate::virtio::io::Buffers;

/// The most bytes of a piece.
const PIECE_BYTES: u64 = 1 << 20;

/// A part of a file and its place in memory.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Where it starts in the file.
    pub offset: u64,
    /// Where it goes.
    pub to: Extent,
}

/// What there is to copy.
pub struct Plan {
    guest: Guest,
    pieces: Vec<Piece>,
    files: [GuestFile; 2],
    next: AtomicUsize,
}

/// Which of the two files.
const KERNEL: usize = 0;
const IMAGE: usize = 1;

struct Piece {
    file: usize,
    part: Part,
}

impl Plan {
    /// Checks kernel and image, and finds their places.
    pub fn new(layout: Layout, kernel: &std::path::Path, image: &std::path::Path) -> Result<Self, BootError> {
        let files = [GuestFile::kernel(kernel)?, GuestFile::image(image)?];
        let [kernel, image] = &files;
        let kernel = place_kernel(layout, kernel)?;
        let initramfs = place_image(layout, image, kernel.end)?;
        let mut pieces: Vec<Piece> = kernel.parts.iter().flat_map(|part| cut(KERNEL, *part)).collect();
        pieces.extend(cut(IMAGE, initramfs));
        let guest = Guest { entry: kernel.entry, initramfs: initramfs.to };
        Ok(Self { guest, pieces, files, next: AtomicUsize::new(0) })
    }

    /// Copies pieces until no piece is left, or one fails. It takes no more than the memory, so that the machine
    /// can be made meanwhile.
    pub fn work(&self, memory: &GuestMemory) -> Result<(), BootError> {
        while let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            self.copy(memory, piece).inspect_err(|_| self.give_up())?;
        }
        Ok(())
    }

    /// Leaves what has not been begun: nobody needs it.
    pub fn give_up(&self) {
        self.next.store(self.pieces.len(), Ordering::Relaxed);
    }

    /// The guest, once every thread's work has ended well.
    pub fn guest(&self) -> Guest {
        self.guest
    }

    fn copy(&self, memory: &GuestMemory, Piece { file, part }: &Piece) -> Result<(), BootError> {
        let file = &self.files[*file];
        let not_read = |why: String| BootError::Read { path: file.path.clone(), why };
        let len = usize::try_from(part.to.len).unwrap_or(usize::MAX);
        let place = memory.get_slice(GuestAddress(part.to.start), len);
        let mut buffers = Buffers::default();
        buffers.push(place.map_err(|error| not_read(error.to_string()))?);
        let mut offset = part.offset;
        while !buffers.is_empty() {
            match buffers.read_from_at(file.file.as_fd(), offset) {
                Ok(0) => return Err(not_read("it has become shorter".to_owned())),
                Ok(count) => offset += count as u64,
                Err(error) => return Err(not_read(error.to_string())),
            }
        }
        Ok(())
    }
}

/// Cuts a part into pieces.
fn cut(file: usize, Part { offset, to }: Part) -> impl Iterator<Item = Piece> {
    (0..to.len.div_ceil(PIECE_BYTES)).map(move |index| {
        let done = index * PIECE_BYTES;
        let to = Extent { start: to.start + done, len: (to.len - done).min(PIECE_BYTES) };
        Piece { file, part: Part { offset: offset + done, to } }
    })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
