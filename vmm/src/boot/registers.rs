//! The registers of a vCPU at its start: in 32-bit protected mode without paging, in which the probe runs its
//! program, and in long mode, in which Linux is entered.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Entry};
use crate::virtio::GuestMemory;

/// Protection enabled, and the bit that is always one.
const CR0: u64 = 0x11;

/// What long mode adds: paging, page tables of entries of 64 bits, and long mode enabled and active.
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// Where the segment descriptors lie, and the two that the protocol wants, by their place.
const DESCRIPTORS: u64 = 0x500;
const BOOT_CODE: u16 = 2;
const BOOT_DATA: u16 = 3;

/// Bit 1 of the flags is always one.
const FLAGS: u64 = 2;

/// Segment types: execute and read, read and write, a busy task. All have been accessed.
const CODE: u8 = 11;
const DATA: u8 = 3;
const BUSY_TASK: u8 = 11;

/// Sets the segments and control registers.
pub fn set_protected_mode(sregs: &mut kvm_sregs) {
    sregs.cs = flat(CODE, 1 << 3);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(DATA, 2 << 3);
    }
    sregs.tr = kvm_segment { limit: 0x67, type_: BUSY_TASK, present: 1, ..Default::default() };
    sregs.cr0 = CR0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// Sets the segments and control registers for Linux.
pub fn set_long_mode(sregs: &mut kvm_sregs, entry: Entry) {
    set_protected_mode(sregs);
    sregs.cs = kvm_segment { l: 1, db: 0, ..flat(CODE, BOOT_CODE << 3) };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(DATA, BOOT_DATA << 3);
    }
    let limit = size_of_val(&descriptors()) as u16 - 1;
    sregs.gdt = kvm_dtable { base: DESCRIPTORS, limit, ..Default::default() };
    sregs.cr3 = entry.page_tables.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0 | CR0_PAGING;
    sregs.efer = EFER_LONG_MODE;
}

/// The general registers: the first instruction, and what `rsi` holds.
pub fn general(instruction: u64, rsi: u64) -> kvm_regs {
    kvm_regs { rflags: FLAGS, rip: instruction, rsi, ..Default::default() }
}

/// Writes the segment descriptors, for a kernel that loads its segments anew before it has its own.
pub fn write_segments(memory: &GuestMemory) -> Result<(), BootError> {
    let failed = |_| BootError::Table("segment descriptors");
    memory.write_obj(descriptors(), GuestAddress(DESCRIPTORS)).map_err(failed)
}

/// None, none, 64-bit code, data: each flat, present and accessed (AMD64 Architecture Programmer's Manual,
/// volume 2, 4.8).
fn descriptors() -> [u64; 4] {
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
}

/// A segment over all 4 GiB.
fn flat(type_: u8, selector: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
