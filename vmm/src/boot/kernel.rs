//! Where the kernel and the initramfs go.
//!
//! Both are copied into memory. Mapping the kernel's code from its file instead was tried: it saved 4 MiB of
//! 39 per machine, but what had been a few large pages became thousands of small ones, each with an exit of its
//! own when the guest first touches it, and most of them copied after all when the kernel patches itself. The
//! start took longer than the copy had.

use vm_memory::GuestAddress;

use super::check::{check_image, check_kernel};
use super::elf::Segment;
use super::plan::Part;
use super::{BootError, GuestFile};
use crate::memory::{Extent, Layout};

const MIB: u64 = 1 << 20;

/// What a kernel and its agent need besides the kernel, the image and the image unpacked: the kernel's tables
/// and a few processes.
const WORKING_BYTES: u64 = 20 * MIB;

/// Where kernels may begin: below are the tables for them.
pub const KERNELS_START: u64 = 2 * MIB;

/// Where kernels of ours are linked to (`CONFIG_PHYSICAL_START`): the memory below stays free.
const KERNEL_START: u64 = 16 * MIB;

/// A kernel's place in memory.
pub struct Kernel {
    /// The entry of its ELF image, which is that of the 64-bit boot protocol.
    pub entry: GuestAddress,
    /// The first address after it.
    pub end: u64,
    /// What is copied where. The memory is fresh: what a segment has behind its bytes of the file is zero.
    pub parts: Vec<Part>,
}

/// Finds the addresses that a kernel says.
pub fn place_kernel(layout: Layout, kernel: &GuestFile) -> Result<Kernel, BootError> {
    let elf = check_kernel(kernel)?;
    let file_bytes = kernel.file.metadata().map_err(|error| kernel.is_no_kernel(error.to_string()))?.len();
    let does_not_fit = |why: String| BootError::LoadKernel {
        path: kernel.path.clone(),
        memory_mib: layout.total() / MIB,
        why,
    };
    let (mut parts, mut end) = (Vec::new(), 0);
    for segment in &elf.segments {
        let (in_file, in_memory) =
            ends(segment).ok_or_else(|| kernel.is_no_kernel("a segment has no end"))?;
        if segment.address < KERNELS_START || segment.file_bytes > segment.memory_bytes {
            return Err(kernel.is_no_kernel("a segment lies below 2 MiB, or is larger than its place"));
        }
        if in_file > file_bytes {
            return Err(does_not_fit("a segment is cut off".to_owned()));
        }
        if in_memory > layout.panic_log().start {
            return Err(does_not_fit(format!("it ends at {} MiB", in_memory / MIB)));
        }
        end = end.max(in_memory);
        parts.push(Part {
            offset: segment.offset,
            to: Extent { start: segment.address, len: segment.file_bytes },
        });
    }
    if !(KERNELS_START..end).contains(&elf.entry) {
        return Err(kernel.is_no_kernel("its entry lies outside it"));
    }
    Ok(Kernel { entry: GuestAddress(elf.entry), end, parts })
}

/// Where a segment ends in the file and in memory.
fn ends(segment: &Segment) -> Option<(u64, u64)> {
    Some((
        segment.offset.checked_add(segment.file_bytes)?,
        segment.address.checked_add(segment.memory_bytes)?,
    ))
}

/// Finds the initramfs a place at the upper end of low memory.
pub fn place_image(layout: Layout, image: &GuestFile, kernel_end: u64) -> Result<Part, BootError> {
    let bytes = check_image(image)?;
    let top = layout.panic_log().start;
    let start = top.checked_sub(bytes).map(|start| start & !0xfff).filter(|&start| start >= kernel_end);
    let needed = kernel_end.saturating_sub(KERNEL_START) + 2 * bytes + WORKING_BYTES;
    let Some(start) = start.filter(|_| needed <= layout.total()) else {
        return Err(BootError::TooLittleMemory {
            memory_mib: layout.total() / MIB,
            kernel_end_mib: kernel_end.div_ceil(MIB),
            image_mib: bytes.div_ceil(MIB),
            needed_mib: needed.max(kernel_end + bytes).div_ceil(MIB) + 1,
        });
    };
    Ok(Part { offset: 0, to: Extent { start, len: bytes } })
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
