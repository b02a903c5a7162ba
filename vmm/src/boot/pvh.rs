//! The PVH start info, with the memory map, the command line and the initramfs that it names.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::BootError;
use crate::memory::{Extent, Layout};
use crate::virtio::GuestMemory;

/// Where the start info lies.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: GuestAddress = GuestAddress(0x6040);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);

/// `xEn3` with the 0x80 bit of the `E` set.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Kinds of memory in the map, those of e820.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Writes everything.
pub fn write(
    memory: &GuestMemory,
    layout: Layout,
    initramfs: Extent,
    cmdline: &str,
) -> Result<(), BootError> {
    let map = memory_map(layout);
    put_slice(memory, MEMORY_MAP, &map, "memory map")?;
    let module = hvm_modlist_entry { paddr: initramfs.start, size: initramfs.len, ..Default::default() };
    put(memory, MODULES, module, "module list")?;
    let text = [cmdline.as_bytes(), b"\0"].concat();
    memory.write_slice(&text, CMDLINE).map_err(|_| BootError::Table("command line"))?;
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: 1,
        modlist_paddr: MODULES.0,
        cmdline_paddr: CMDLINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    put(memory, START_INFO, info, "start info")
}

fn memory_map(layout: Layout) -> Vec<hvm_memmap_table_entry> {
    let entry = |extent: Extent, type_| hvm_memmap_table_entry {
        addr: extent.start,
        size: extent.len,
        type_,
        ..Default::default()
    };
    let mut map: Vec<_> = layout.usable().into_iter().map(|extent| entry(extent, RAM)).collect();
    map.push(entry(layout.panic_log(), RESERVED));
    map.sort_by_key(|entry| entry.addr);
    map
}

/// A structure of the start info as bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Raw<T>(T);

// SAFETY: three C structures of integers without padding: 56, 32 and 24 bytes, checked below.
unsafe impl ByteValued for Raw<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Raw<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Raw<hvm_memmap_table_entry> {}

const _: () = assert!(size_of::<hvm_start_info>() == 56);
const _: () = assert!(size_of::<hvm_modlist_entry>() == 32);
const _: () = assert!(size_of::<hvm_memmap_table_entry>() == 24);

fn put<T>(memory: &GuestMemory, at: GuestAddress, value: T, what: &'static str) -> Result<(), BootError>
where
    Raw<T>: ByteValued,
{
    memory.write_obj(Raw(value), at).map_err(|_| BootError::Table(what))
}

fn put_slice<T: Copy>(
    memory: &GuestMemory,
    at: GuestAddress,
    values: &[T],
    what: &'static str,
) -> Result<(), BootError>
where
    Raw<T>: ByteValued,
{
    for (index, value) in values.iter().enumerate() {
        put(memory, GuestAddress(at.0 + (index * size_of::<T>()) as u64), *value, what)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_but_the_holes() {
        let map = memory_map(Layout::new(5 << 30));
        let ram: u64 = map.iter().filter(|entry| entry.type_ == RAM).map(|entry| entry.size).sum();
        assert_eq!(ram, (5 << 30) - 0x10000 - (0x10_0000 - 0x9_fc00));
        let sorted = map.windows(2).all(|pair| pair[0].addr + pair[0].size <= pair[1].addr);
        assert!(sorted && map.len() == 4);
    }

    #[test]
    fn the_start_info_names_the_rest() {
        let layout = Layout::new(64 << 20);
        let memory = crate::memory::map(layout).unwrap();
        write(&memory, layout, Extent { start: 0x300_0000, len: 123 }, "panic=-1").unwrap();
        let info: Raw<hvm_start_info> = memory.read_obj(START_INFO).unwrap();
        let module: Raw<hvm_modlist_entry> = memory.read_obj(GuestAddress(info.0.modlist_paddr)).unwrap();
        assert_eq!((module.0.paddr, module.0.size), (0x300_0000, 123));
        let mut text = [0; 9];
        memory.read_slice(&mut text, GuestAddress(info.0.cmdline_paddr)).unwrap();
        assert_eq!(&text, b"panic=-1\0");
        assert_eq!(info.0.memmap_entries, 3);
    }
}
