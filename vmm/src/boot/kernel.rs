//! The kernel and the initramfs.
//!
//! Both are copied into memory. Mapping the kernel's code from its file instead was tried: it saved 4 MiB of
//! 39 per machine, but what had been a few large pages became thousands of small ones, each with an exit of its
//! own when the guest first touches it, and most of them copied after all when the kernel patches itself. The
//! start took longer than the copy had.

use linux_loader::loader::elf::{Elf, Error as ElfError, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader as _};
use vm_memory::{Bytes, GuestAddress};

use super::check::{check_image, check_kernel};
use super::{BootError, GuestFile};
use crate::memory::{EXTENDED_START, Extent, Layout};
use crate::virtio::GuestMemory;

const MIB: u64 = 1 << 20;

/// What a kernel and its agent need besides the kernel, the image and the image unpacked: the kernel's tables
/// and a few processes.
const WORKING_BYTES: u64 = 20 * MIB;

/// Where kernels of ours are linked to (`CONFIG_PHYSICAL_START`): the memory below stays free.
const KERNEL_START: u64 = 16 * MIB;

/// A kernel in memory.
pub struct Loaded {
    /// Its PVH entry.
    pub entry: GuestAddress,
    /// The first address after it.
    pub end: u64,
}

/// Loads a kernel to the addresses that it says.
pub fn load_kernel(
    memory: &GuestMemory,
    layout: Layout,
    kernel: &mut GuestFile,
) -> Result<Loaded, BootError> {
    check_kernel(kernel)?;
    let path = kernel.path.clone();
    let memory_mib = layout.total() / MIB;
    let loaded = Elf::load(memory, None, &mut kernel.file, Some(GuestAddress(EXTENDED_START)));
    let loaded = loaded.map_err(|error| match error {
        LoaderError::Elf(ElfError::ReadKernelImage) => BootError::LoadKernel {
            path: path.clone(),
            memory_mib,
            why: "a segment is cut off, or does not fit into the memory".to_owned(),
        },
        error => BootError::NotAKernel { path: path.clone(), why: error.to_string() },
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry(path));
    };
    if loaded.kernel_end > layout.panic_log().start {
        let why = format!("it ends at {} MiB", loaded.kernel_end / MIB);
        return Err(BootError::LoadKernel { path, memory_mib, why });
    }
    Ok(Loaded { entry, end: loaded.kernel_end })
}

/// Loads the initramfs to the upper end of low memory.
pub fn load_image(
    memory: &GuestMemory,
    layout: Layout,
    image: &mut GuestFile,
    kernel_end: u64,
) -> Result<Extent, BootError> {
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
    let count = usize::try_from(bytes).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut image.file, count)
        .map_err(|why| BootError::ReadImage { path: image.path.clone(), why: why.to_string() })?;
    Ok(Extent { start, len: bytes })
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
