use std::io::Write as _;

use super::*;

const CPIO_MAGIC: &[u8] = b"070701";

const PVH_ENTRY: u32 = 0x100_0123;

/// An ELF image of one segment at 16 MiB, with or without the note of a PVH entry.
fn elf(segment_bytes: u64, memory_bytes: u64, pvh: bool) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    let segment_offset = 0x200u64;
    let note_offset = 0x100u64;
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend(KERNEL_START.to_le_bytes());
    image.extend(64u64.to_le_bytes());
    image.extend([0; 8]);
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, fields: [u64; 6]| {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for field in fields {
            image.extend(field.to_le_bytes());
        }
    };
    header(1, [segment_offset, KERNEL_START, KERNEL_START, segment_bytes, memory_bytes, 0x1000]);
    header(4, [note_offset, 0, 0, 20, 20, 4]);
    image.resize(note_offset as usize, 0);
    image.extend(4u32.to_le_bytes());
    image.extend(4u32.to_le_bytes());
    image.extend(if pvh { 18u32 } else { 17 }.to_le_bytes());
    image.extend(b"Xen\0");
    image.extend(PVH_ENTRY.to_le_bytes());
    image.resize(segment_offset as usize, 0);
    image.resize((segment_offset + segment_bytes) as usize, 0x5a);
    image
}

fn file(content: &[u8]) -> (tempfile::NamedTempFile, GuestFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let opened = GuestFile::kernel(file.path()).unwrap();
    (file, opened)
}

fn kernel(content: &[u8], memory_mib: u64) -> Result<Kernel, BootError> {
    place_kernel(Layout::new(memory_mib * MIB), &file(content).1)
}

fn image(content: &[u8], memory_mib: u64) -> Result<Extent, BootError> {
    place_image(Layout::new(memory_mib * MIB), &file(content).1, 30 * MIB).map(|part| part.to)
}

#[test]
fn a_kernel_is_placed_and_entered_where_its_headers_say() {
    let kernel = kernel(&elf(0x1000, 0x3000, true), 64).unwrap();
    assert_eq!((kernel.entry.0, kernel.end), (KERNEL_START, KERNEL_START + 0x3000));
    let [part] = kernel.parts[..] else { panic!("{} parts", kernel.parts.len()) };
    assert_eq!((part.offset, part.to), (0x200, Extent { start: KERNEL_START, len: 0x1000 }));
}

#[test]
fn what_is_no_kernel_is_told_apart() {
    let text = |content: &[u8], memory_mib| kernel(content, memory_mib).err().unwrap().to_string();
    assert!(text(b"#!/bin/sh\n", 64).contains("too short"));
    assert!(text(&[0; 4096], 64).contains("no ELF image"));
    assert!(text(&elf(0x1000, 0x1000, false), 64).contains("CONFIG_PVH=y"));
    assert!(text(&elf(0x1000, 0x1000, true)[..0x800], 64).contains("cut off"));
    assert!(text(&elf(0x1000, 100 * MIB, true), 64).contains("it ends at 116 MiB"));
    let mut low = elf(0x1000, 0x1000, true);
    low[24..32].copy_from_slice(&0x1000u64.to_le_bytes());
    assert!(text(&low, 64).contains("entry lies outside it"));
    for (field, value) in [(24, 0x1000), (24, u64::MAX), (32, u64::MAX), (32, 0x2000)] {
        let mut damaged = elf(0x1000, 0x1000, true);
        damaged[64 + field..][..8].copy_from_slice(&value.to_le_bytes());
        assert!(text(&damaged, 64).contains("is not a guest kernel: a segment"), "{field} {value}");
    }
    let mut high = elf(0x1000, 0x1000, true);
    high[24..32].copy_from_slice(&(KERNEL_START + 0x1000).to_le_bytes());
    assert!(text(&high, 64).contains("entry lies outside it"));
    let mut other = elf(0x1000, 0x1000, true);
    other[18] = 183;
    assert!(text(&other, 64).contains("not of a 64-bit x86 program"));
}

#[test]
fn an_image_lies_at_the_top_below_the_panic_log() {
    let content = [CPIO_MAGIC, &[1; 5000]].concat();
    let extent = image(&content, 64).unwrap();
    assert_eq!(extent.len, 5006);
    assert_eq!(extent.start % 4096, 0);
    assert!(extent.end() <= 64 * MIB - 0x10000 && extent.end() > 64 * MIB - 0x10000 - 4096);
}

#[test]
fn an_image_that_is_none_is_refused() {
    for content in [&b""[..], b"070", b"\x1f\x8b\x08\0\0\0\0\0", &[0; 100]] {
        assert!(matches!(image(content, 64), Err(BootError::NotAnImage { .. })));
    }
}

#[test]
fn too_little_memory_says_what_would_do() {
    let content = [CPIO_MAGIC, &vec![0; 8 << 20]].concat();
    let error = image(&content, 48).unwrap_err().to_string();
    assert!(
        error.contains("48 MiB of memory are too little") && error.contains("at least 52 MiB"),
        "{error}"
    );
    assert!(image(&content, 52).is_ok());
}
