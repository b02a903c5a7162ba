//! Whether the guest's files are what they are said to be, for either machine, before one is made.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{BootError, GuestFile};

/// Fields of an ELF header and of a program header, by offset and length.
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// The most program headers and bytes of notes that are read; kernels have 5 and 500.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTE_BYTES: u64 = 64 << 10;

const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
const MACHINE_X86_64: u16 = 62;
const KIND_NOTE: u32 = 4;

/// `XEN_ELFNOTE_PHYS32_ENTRY`, a note of the owner `Xen`: the PVH entry.
const PVH_NOTE: u32 = 18;

/// The first bytes of a cpio archive in the format of an initramfs.
const CPIO_MAGIC: [u8; 6] = *b"070701";

/// Checks that a file is a kernel with a PVH entry.
pub fn check_kernel(kernel: &GuestFile) -> Result<(), BootError> {
    match has_pvh_entry(&kernel.file) {
        Ok(true) => Ok(()),
        Ok(false) => Err(BootError::NoPvhEntry(kernel.path.clone())),
        Err(why) => Err(BootError::NotAKernel { path: kernel.path.clone(), why }),
    }
}

/// Checks that a file looks like an initramfs, and returns its size.
pub fn check_image(image: &GuestFile) -> Result<u64, BootError> {
    let not_an_image = |why| BootError::NotAnImage { path: image.path.clone(), why };
    let mut magic = [0; CPIO_MAGIC.len()];
    match image.file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == CPIO_MAGIC => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(not_read(image, error)),
        _ => return Err(not_an_image("it does not start as an uncompressed cpio archive does")),
    }
    image.file.metadata().map(|data| data.len()).map_err(|error| not_read(image, error))
}

fn not_read(image: &GuestFile, why: io::Error) -> BootError {
    BootError::ReadImage { path: image.path.clone(), why: why.to_string() }
}

fn has_pvh_entry(file: &File) -> Result<bool, String> {
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
    for index in 0..u64::from(count) {
        let at = table.saturating_add(index * u64::from(size));
        let program = Fields(read_at(file, at, PROGRAM_HEADER_BYTES)?);
        let bytes = program.u64(32)?;
        if program.u32(0)? == KIND_NOTE && bytes <= MAX_NOTE_BYTES {
            let notes = Fields(read_at(file, program.u64(8)?, bytes as usize)?);
            if notes_have_pvh_entry(&notes)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
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
