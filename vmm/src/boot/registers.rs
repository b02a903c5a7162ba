//! The registers of a vCPU that starts in 32-bit protected mode without paging: the state that PVH asks for,
//! and the one in which the probe runs its program.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// Protection enabled, and the bit that is always one.
const CR0: u64 = 0x11;

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

/// The general registers: the first instruction, and what `ebx` holds.
pub fn general(instruction: u64, ebx: u64) -> kvm_regs {
    kvm_regs { rflags: FLAGS, rip: instruction, rbx: ebx, ..Default::default() }
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
