//! What the 64-bit boot protocol of Linux asks for (its `Documentation/arch/x86/boot.rst`): the zero page, which
//! names the command line, the initramfs and a memory map, and the page tables that the kernel starts on.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::{Extent, Layout};
use crate::virtio::GuestMemory;

/// Where the zero page lies, for tables from this address on.
pub const fn zero_page(tables: u64) -> u64 {
    tables + 0x7000
}

/// Where the page tables lie: one of each level but the last, whose place large pages take.
pub const fn page_tables(tables: u64) -> u64 {
    tables + 0x8000
}

const fn command_line(tables: u64) -> u64 {
    tables + 0x2_0000
}

/// Where they end: the kernel reads 2 KiB of a command line.
pub const fn end(tables: u64) -> u64 {
    command_line(tables) + 0x800
}

const PAGE_BYTES: u64 = 0x1000;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES_PER_TABLE: u64 = 512;
/// Bits of a page table's entries.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// What a setup header has at its start, and the version of the protocol that has all fields used here.
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const VERSION: u16 = 0x20c;
/// A loader that the kernel's list has no number for.
const UNDEFINED_LOADER: u8 = 0xff;

/// Kinds of memory in the map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Writes everything, from an address on.
pub fn write(
    memory: &GuestMemory,
    layout: Layout,
    tables: u64,
    initramfs: Extent,
    cmdline: &str,
) -> Result<(), BootError> {
    let text = [cmdline.as_bytes(), b"\0"].concat();
    let at = command_line(tables);
    memory.write_slice(&text, GuestAddress(at)).map_err(|_| BootError::Table("command line"))?;
    let page = parameters(layout, initramfs, Extent { start: at, len: cmdline.len() as u64 })?;
    let at = GuestAddress(zero_page(tables));
    memory.write_obj(page, at).map_err(|_| BootError::Table("zero page"))?;
    write_page_tables(memory, page_tables(tables))
}

/// The content of the zero page.
fn parameters(layout: Layout, initramfs: Extent, cmdline: Extent) -> Result<boot_params, BootError> {
    let below_4_gib = |value: u64, what| u32::try_from(value).map_err(|_| BootError::Table(what));
    let hdr = setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: VERSION,
        type_of_loader: UNDEFINED_LOADER,
        ramdisk_image: below_4_gib(initramfs.start, "initramfs")?,
        ramdisk_size: below_4_gib(initramfs.len, "initramfs")?,
        cmd_line_ptr: below_4_gib(cmdline.start, "command line")?,
        cmdline_size: below_4_gib(cmdline.len, "command line")?,
        ..Default::default()
    };
    let mut page = boot_params { hdr, ..Default::default() };
    let map = memory_map(layout);
    page.e820_entries = map.len() as u8;
    for (to, entry) in page.e820_table.iter_mut().zip(map) {
        *to = entry;
    }
    Ok(page)
}

/// At most four entries: the kernel's table has 128.
fn memory_map(layout: Layout) -> Vec<boot_e820_entry> {
    let entry = |extent: Extent, type_| boot_e820_entry { addr: extent.start, size: extent.len, type_ };
    let mut map: Vec<_> = layout.usable().into_iter().map(|extent| entry(extent, RAM)).collect();
    map.push(entry(layout.panic_log(), RESERVED));
    map.sort_by_key(|entry| entry.addr);
    map
}

/// The first GiB, each address at itself: the kernel, the zero page and the command line.
fn write_page_tables(memory: &GuestMemory, top: u64) -> Result<(), BootError> {
    let put = |at: u64, entry: u64| {
        memory.write_obj(entry, GuestAddress(at)).map_err(|_| BootError::Table("page tables"))
    };
    let second = top + PAGE_BYTES;
    let third = second + PAGE_BYTES;
    put(top, second | PRESENT | WRITABLE)?;
    put(second, third | PRESENT | WRITABLE)?;
    (0..ENTRIES_PER_TABLE).try_for_each(|index| {
        put(third + index * size_of::<u64>() as u64, (index * LARGE_PAGE_BYTES) | PRESENT | WRITABLE | LARGE)
    })
}

const _: () = assert!(size_of::<boot_params>() as u64 == PAGE_BYTES);

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
    fn the_zero_page_names_the_rest() {
        let layout = Layout::new(64 << 20);
        let memory = crate::memory::map(layout).unwrap();
        let tables = 0x10_0000;
        write(&memory, layout, tables, Extent { start: 0x300_0000, len: 123 }, "panic=-1").unwrap();
        let page: boot_params = memory.read_obj(GuestAddress(zero_page(tables))).unwrap();
        let hdr = page.hdr;
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0x300_0000, 123));
        let mut text = [0; 9];
        memory.read_slice(&mut text, GuestAddress(u64::from(hdr.cmd_line_ptr))).unwrap();
        assert_eq!(&text, b"panic=-1\0");
        assert_eq!(page.e820_entries, 3);
    }

    #[test]
    fn the_page_tables_lead_to_the_same_address() {
        const TOP: u64 = 0x8000;
        let memory = crate::memory::map(Layout::new(1 << 20)).unwrap();
        write_page_tables(&memory, TOP).unwrap();
        let entry =
            |table: u64, index: u64| -> u64 { memory.read_obj(GuestAddress(table + index * 8)).unwrap() };
        let address: u64 = 0x0123_4567;
        let next = |entry: u64| entry & !(PAGE_BYTES - 1);
        let third = next(entry(next(entry(TOP, 0)), 0));
        let page = entry(third, address / LARGE_PAGE_BYTES);
        assert_eq!(next(page) & !LARGE, address & !(LARGE_PAGE_BYTES - 1));
        assert_ne!(page & LARGE, 0);
        assert_eq!(entry(TOP, 1), 0);
    }
}
