//! What an ELF image of a kernel says of itself: where its segments go, where it is entered, and whether it has a
//! PVH entry, which tells a kernel from other programs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Fields of an ELF header and of a program header, by offset and length.
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// The most program headers and bytes of notes that are read; kernels have 5 and 500.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTE_BYTES: u64 = 64 << 10;

const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
const MACHINE_X86_64: u16 = 62;
const KIND_LOAD: u32 = 1;
const KIND_NOTE: u32 = 4;

/// `XEN_ELFNOTE_PHYS32_ENTRY`, a note of the owner `Xen`: the PVH entry.
const PVH_NOTE: u32 = 18;

/// An ELF image.
pub struct Elf {
    /// Its first instruction, a physical address.
    pub entry: u64,
    /// What goes into memory.
    pub segments: Vec<Segment>,
    /// Whether it has a PVH entry.
    pub pvh: bool,
}

/// A part of the file that goes into memory, with zeros after it up to its size there.
pub struct Segment {
    /// Where it is in the file.
    pub offset: u64,
    /// Its bytes there.
    pub file_bytes: u64,
    /// Where it goes, a physical address.
    pub address: u64,
    /// Its bytes in memory.
    pub memory_bytes: u64,
}

/// Reads the headers and notes of an image. An error says in words what the file is not.
pub fn read(file: &File) -> Result<Elf, String> {
    let header = Fields(read_at(file, 0, HEADER_BYTES)?);
    if header.bytes(0, 4)? != b"\x7fELF" {
        return Err("it is no ELF image".to_owned());
    }
    if header.bytes(4, 2)? != CLASS_64_LITTLE_ENDIAN || header.u16(18)? != MACHINE_X86_64 {
        return Err("it is an ELF image, but not of a 64-bit x86 program".to_owned());
    }
    let (table, size, count) = (header.u64(32)?, header.u16(54)?, header.u16(56)?);
    if usize::from(size) != PROGRAM_HEADER_BYTES || count > MAX_PROGRAM_HEADERS {
        return Err("its program headers are damaged".to_owned());
    }
    let mut elf = Elf { entry: header.u64(24)?, segments: Vec::new(), pvh: false };
    for index in 0..u64::from(count) {
        let at = table.saturating_add(index * u64::from(size));
        let program = Fields(read_at(file, at, PROGRAM_HEADER_BYTES)?);
        let segment = Segment {
            offset: program.u64(8)?,
            file_bytes: program.u64(32)?,
            address: program.u64(24)?,
            memory_bytes: program.u64(40)?,
        };
        match program.u32(0)? {
            KIND_LOAD => elf.segments.push(segment),
            KIND_NOTE if segment.file_bytes <= MAX_NOTE_BYTES => {
                let notes = Fields(read_at(file, segment.offset, segment.file_bytes as usize)?);
                elf.pvh |= notes_have_pvh_entry(&notes)?;
            }
            _ => {}
        }
    }
    Ok(elf)
}

/// Notes are: length of the owner's name, length of the content, type, name, content; both padded to words.
fn notes_have_pvh_entry(notes: &Fields) -> Result<bool, String> {
    let padded = |len: u32| (len as usize).next_multiple_of(4);
    let mut at = 0;
    while at < notes.0.len() {
        let (name, content, kind) = (notes.u32(at)?, notes.u32(at + 4)?, notes.u32(at + 8)?);
        if kind == PVH_NOTE && notes.bytes(at + 12, name as usize)? == b"Xen\0" {
            return Ok(true);
        }
        at += 12 + padded(name) + padded(content);
    }
    Ok(false)
}

/// Little-endian fields of a structure in a file.
struct Fields(Vec<u8>);

impl Fields {
    fn bytes(&self, at: usize, len: usize) -> Result<&[u8], String> {
        at.checked_add(len).and_then(|end| self.0.get(at..end)).ok_or_else(|| "it is damaged".to_owned())
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        self.bytes(at, N)?.try_into().map_err(|_| "it is damaged".to_owned())
    }

    fn u16(&self, at: usize) -> Result<u16, String> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, String> {
        self.array(at).map(u64::from_le_bytes)
    }
}

fn read_at(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; len];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err("it is too short".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
