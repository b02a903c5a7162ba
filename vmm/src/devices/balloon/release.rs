//! Giving guest memory back to the host.

use rustix::mm::{Advice, madvise};

use crate::virtio::io::Slice;

/// The bytes of a page of an x86-64 host.
const PAGE_BYTES: usize = 4096;

/// Gives back what a part of guest memory has of whole pages; returns their bytes. Private anonymous memory
/// is all zeroes at the next touch.
pub fn release(slice: &Slice<'_>) -> u64 {
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr();
    let to_first = (start as usize).wrapping_neg() % PAGE_BYTES;
    let bytes = guard.len().saturating_sub(to_first) / PAGE_BYTES * PAGE_BYTES;
    if bytes == 0 {
        return 0;
    }
    // SAFETY: the range lies inside the slice, whose memory stays mapped while the guard lives, and has whole
    // pages only. Guest memory holds nothing that Rust relies on: it may change at any time, and is only read
    // by volatile accesses or by the kernel.
    let outcome = unsafe { madvise(start.add(to_first).cast(), bytes, Advice::LinuxDontNeed) };
    match outcome {
        Ok(()) => bytes as u64,
        Err(error) => {
            tracing::debug!(%error, bytes, "the host does not take guest memory back");
            0
        }
    }
}
