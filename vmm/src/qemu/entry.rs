//! The program that QEMU is told to boot: a few instructions that enter a kernel as the KVM machine does.
//!
//! Kernel and image are copied into guest memory by this process, before the guest runs. QEMU could do so by itself
//! (`-kernel` and `-initrd`), and did; but of a kernel that is an ELF image it keeps the first 8 KiB for its firmware by
//! a pointer into its own stack, which by then belongs to other functions (7.2, `x86_load_linux`). The guest read
//! addresses and the stack's canary there. A multiboot program is kept in a place of its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::MemfdFlags;
use vm_memory::GuestAddress;

use crate::boot::linux;
use crate::memory::EXTENDED_START;

/// Where the tables for the kernel begin: behind what firmware takes for itself.
pub const TABLES: u64 = EXTENDED_START;

/// Where the program lies: behind them, and before every kernel. QEMU puts a page for it after that.
const PLACE: u64 = 0x1f_0000;

/// Where its segment descriptors lie, behind its header and a field.
const SEGMENTS: u64 = PLACE + 40;

/// QEMU looks for a program's header in so many bytes, whether the file has them or not.
const FILE_BYTES: usize = 8 << 10;

std::arch::global_asm!(
    include_str!("entry.s"),
    place = const PLACE,
    segments = const SEGMENTS,
    page_tables = const linux::page_tables(TABLES),
    zero_page = const linux::zero_page(TABLES),
);

unsafe extern "C" {
    static sandbox_qemu_entry_start: u8;
    static sandbox_qemu_entry_kernel: u8;
    static sandbox_qemu_entry_end: u8;
}

/// The program, in a file that anybody who has the descriptor can read: it enters a kernel here.
pub fn file(kernel: GuestAddress) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("entry", MemfdFlags::CLOEXEC)?);
    file.set_len(FILE_BYTES as u64)?;
    file.write_all_at(&program(kernel), 0)?;
    Ok(file)
}

fn program(kernel: GuestAddress) -> Vec<u8> {
    let (start, end) = (&raw const sandbox_qemu_entry_start, &raw const sandbox_qemu_entry_end);
    let field = &raw const sandbox_qemu_entry_kernel;
    // SAFETY: the names are of one section of read-only data, in this order, with only the program in between.
    let (code, field) = unsafe {
        let bytes = end.offset_from_unsigned(start);
        (std::slice::from_raw_parts(start, bytes), field.offset_from_unsigned(start))
    };
    let mut program = code.to_vec();
    program.splice(field..field + size_of::<u64>(), kernel.0.to_le_bytes());
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of a header (Multiboot Specification 0.6.96, 3.1).
    #[test]
    fn it_is_a_multiboot_program_that_lies_below_kernels() {
        let program = program(GuestAddress(0x100_0000));
        let field = |index: usize| u32::from_le_bytes(program[4 * index..][..4].try_into().unwrap());
        assert_eq!(field(0), 0x1bad_b002);
        assert_eq!(field(0).wrapping_add(field(1)).wrapping_add(field(2)), 0);
        assert_eq!((u64::from(field(3)), u64::from(field(4))), (PLACE, PLACE));
        assert_eq!(u64::from(field(5)), PLACE + program.len() as u64);
        assert!(
            u64::from(field(5)) < crate::boot::KERNELS_START && field(7) > field(4) && field(7) < field(5)
        );
        assert_eq!(program[32..40], 0x100_0000u64.to_le_bytes());
        assert!(linux::end(TABLES) <= PLACE);
    }
}
