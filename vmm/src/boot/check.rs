//! Whether the guest's files are what they are said to be, for either machine, before one is made.

use std::io;
use std::os::unix::fs::FileExt;

use super::elf::{self, Elf};
use super::{BootError, GuestFile};

/// The first bytes of a cpio archive in the format of an initramfs.
const CPIO_MAGIC: [u8; 6] = *b"070701";

/// Checks that a file is a kernel with a PVH entry, and returns what it says of itself.
pub fn check_kernel(kernel: &GuestFile) -> Result<Elf, BootError> {
    match elf::read(&kernel.file) {
        Ok(elf) if elf.pvh => Ok(elf),
        Ok(_) => Err(BootError::NoPvhEntry(kernel.path.clone())),
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
    BootError::Read { path: image.path.clone(), why: why.to_string() }
}
