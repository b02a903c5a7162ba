//! Where things are in the guest's physical address space, and the memory itself.
//!
//! ```text
//!  0                      start-up tables, see boot
//!  640 KiB .. 1 MiB       where a PC has its ROMs: no RAM to the guest, but the MP table lies there
//!  1 MiB ..               low memory, up to 3 GiB; its last 64 KiB keep the kernel's last words
//!  3.25 GiB ..            virtio-mmio devices, a page each
//!  4 GiB - 20 MiB ..      I/O APIC, local APICs, KVM's own pages
//!  4 GiB ..               high memory: what does not fit below
//! ```
//!
//! On KVM, guest memory is private and anonymous, without reserve: the host gives a page when the guest first touches
//! it, and takes it back when the balloon reports it free.

use std::fs::File;
use std::sync::Arc;

use sandbox_vmm_api::PANIC_LOG_BYTES;
use vm_memory::{FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use crate::virtio::GuestMemory;

/// Where low memory ends at the latest, on QEMU's board as well.
pub const LOW_MEMORY_END: u64 = 3 << 30;
/// Where high memory starts.
pub const HIGH_MEMORY_START: u64 = 4 << 30;
/// Where conventional memory ends for the guest: what lies above belongs to the firmware.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where extended memory starts.
pub const EXTENDED_START: u64 = 1 << 20;
/// The first virtio-mmio device.
pub const MMIO_START: u64 = 0xd000_0000;
/// Three pages that KVM needs on Intel processors without unrestricted guests, and one before them.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// A part of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first address.
    pub start: u64,
    /// Its bytes.
    pub len: u64,
}

impl Extent {
    /// The part from one address up to another.
    pub fn new(start: u64, end: u64) -> Self {
        Self { start, len: end.saturating_sub(start) }
    }

    /// The first address after it.
    pub fn end(self) -> u64 {
        self.start + self.len
    }
}

/// How a guest's memory is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    low: u64,
    high: u64,
}

impl Layout {
    /// The layout of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let low = bytes.min(LOW_MEMORY_END);
        Self { low, high: bytes - low }
    }

    /// All bytes.
    pub fn total(self) -> u64 {
        self.low + self.high
    }

    /// All memory, as the host backs it.
    pub fn backed(self) -> Vec<Extent> {
        let low = Extent { start: 0, len: self.low };
        let high = Extent { start: HIGH_MEMORY_START, len: self.high };
        [low, high].into_iter().filter(|extent| extent.len > 0).collect()
    }

    /// The parts that the guest may use as it likes.
    pub fn usable(self) -> Vec<Extent> {
        let mut usable =
            vec![Extent::new(0, CONVENTIONAL_END), Extent::new(EXTENDED_START, self.panic_log().start)];
        if self.high > 0 {
            usable.push(Extent { start: HIGH_MEMORY_START, len: self.high });
        }
        usable
    }

    /// Where the kernel leaves its last words.
    pub fn panic_log(self) -> Extent {
        Extent::new(self.low - PANIC_LOG_BYTES, self.low)
    }
}

/// Guest memory could not be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {bytes} bytes of guest memory: {why}")]
pub struct MapError {
    bytes: u64,
    why: String,
}

/// Maps guest memory; no page of it is allocated yet.
pub fn map(layout: Layout) -> Result<GuestMemory, MapError> {
    map_parts(layout, None)
}

/// Maps guest memory that is a file, whose holes are left out.
pub fn map_file(layout: Layout, file: &File) -> Result<GuestMemory, MapError> {
    map_parts(layout, Some(file))
}

fn map_parts(layout: Layout, file: Option<&File>) -> Result<GuestMemory, MapError> {
    let failed = |why: String| MapError { bytes: layout.total(), why };
    let file = file.map(File::try_clone).transpose().map_err(|error| failed(error.to_string()))?;
    let file = file.map(Arc::new);
    let (mut ranges, mut offset) = (Vec::new(), 0);
    for extent in layout.backed() {
        let len = usize::try_from(extent.len).map_err(|error| failed(error.to_string()))?;
        let part = file.clone().map(|file| FileOffset::from_arc(file, offset));
        ranges.push((GuestAddress(extent.start), len, part));
        offset += extent.len;
    }
    GuestMemory::from_ranges_with_files(&ranges).map_err(|error| failed(error.to_string()))
}

/// How much of guest memory is resident on the host, in bytes.
pub fn resident_bytes(memory: &GuestMemory) -> std::io::Result<u64> {
    /// How much is asked for at a time.
    const STEP_PAGES: usize = 16 << 10;
    const PAGE_BYTES: usize = 4096;
    let mut pages = vec![0u8; STEP_PAGES];
    let mut resident = 0;
    for region in memory.iter() {
        let len = usize::try_from(region.len()).unwrap_or(usize::MAX);
        for offset in (0..len).step_by(STEP_PAGES * PAGE_BYTES) {
            let part = (len - offset).min(STEP_PAGES * PAGE_BYTES);
            // SAFETY: the part lies in the region's mapping, and `pages` has a byte for each of its pages.
            let result =
                unsafe { libc::mincore(region.as_ptr().add(offset).cast(), part, pages.as_mut_ptr()) };
            if result != 0 {
                return Err(std::io::Error::last_os_error());
            }
            let count = pages.iter().take(part.div_ceil(PAGE_BYTES)).filter(|&&page| page & 1 != 0).count();
            resident += (count * PAGE_BYTES) as u64;
        }
    }
    Ok(resident)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use proptest::prelude::*;
    use sandbox_vmm_api::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};
    use vm_memory::Bytes;

    use super::*;

    /// Whether none of these overlaps another.
    fn are_apart(extents: &[Extent]) -> bool {
        let mut sorted = extents.to_vec();
        sorted.sort_by_key(|extent| extent.start);
        sorted.windows(2).all(|pair| pair[0].end() <= pair[1].start)
    }

    proptest! {
        /// What is backed is all of it, apart from devices and from what KVM takes; what the guest may use is
        /// backed, and leaves its last words alone.
        #[test]
        fn every_layout_keeps_its_parts_apart(mib in MIN_MEMORY_MIB..=MAX_MEMORY_MIB) {
            let bytes = u64::from(mib) << 20;
            let layout = Layout::new(bytes);
            let backed = layout.backed();
            prop_assert_eq!(backed.iter().map(|extent| extent.len).sum::<u64>(), bytes);
            prop_assert_eq!(layout.total(), bytes);
            let devices = Extent::new(MMIO_START, HIGH_MEMORY_START);
            prop_assert!(are_apart(&[backed.clone(), vec![devices]].concat()));
            let parts = [layout.usable(), vec![layout.panic_log()]].concat();
            prop_assert!(are_apart(&parts));
            for part in parts {
                prop_assert!(part.len > 0);
                prop_assert!(backed.iter().any(|it| it.start <= part.start && part.end() <= it.end()));
            }
        }
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn little_memory_is_low() {
        let layout = Layout::new(64 << 20);
        assert_eq!(layout.backed(), [Extent { start: 0, len: 64 << 20 }]);
        assert_eq!(layout.panic_log(), Extent { start: (64 << 20) - 0x10000, len: 0x10000 });
        assert_eq!(layout.usable().last().unwrap().end(), layout.panic_log().start);
    }

    #[test]
    fn the_gap_is_left_out() {
        let layout = Layout::new(5 * GIB);
        assert_eq!(
            layout.backed(),
            [Extent { start: 0, len: 3 * GIB }, Extent { start: 4 * GIB, len: 2 * GIB }]
        );
        assert_eq!(layout.panic_log().end(), LOW_MEMORY_END);
        const { assert!(MMIO_START > LOW_MEMORY_END) };
    }

    #[test]
    fn exactly_the_low_memory_has_no_high_part() {
        assert_eq!(Layout::new(3 * GIB).usable().len(), 2);
        assert_eq!(Layout::new(3 * GIB + 4096).usable().len(), 3);
    }

    #[test]
    fn memory_of_a_file_is_its_parts_in_a_row() {
        let layout = Layout::new(4 * GIB);
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * GIB).unwrap();
        let memory = map_file(layout, &file).unwrap();
        memory.write_obj(1u8, GuestAddress(0x1234)).unwrap();
        memory.write_obj(2u8, GuestAddress(HIGH_MEMORY_START + 0x1234)).unwrap();
        let mut byte = [0];
        for (offset, expected) in [(0x1234, 1), (3 * GIB + 0x1234, 2)] {
            file.read_exact_at(&mut byte, offset).unwrap();
            assert_eq!(byte, [expected]);
        }
    }

    #[test]
    fn memory_is_mapped_but_not_taken() {
        let memory = map(Layout::new(5 * GIB)).unwrap();
        assert_eq!(resident_bytes(&memory).unwrap(), 0);
        memory.write_obj(1u8, GuestAddress(HIGH_MEMORY_START + GIB)).unwrap();
        assert_eq!(resident_bytes(&memory).unwrap(), 4096);
    }
}
