//! What to say about a vCPU that cannot go on.

use std::fmt::Write as _;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuFd;

/// What went wrong, and where the vCPU was.
pub fn describe(vcpu: &VcpuFd, what: &str) -> String {
    let mut text = what.to_owned();
    if let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) {
        let _ = write!(
            text,
            " (rip {:#x}, rsp {:#x}, rflags {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, cs {:#x})",
            regs.rip, regs.rsp, regs.rflags, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cs.selector
        );
    }
    text
}

/// What a KVM internal error was about.
pub fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: KVM has just filled this member, as the exit reason says.
    let error = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let what = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction that KVM cannot emulate",
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event that could not be delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that KVM did not expect",
        _ => "an unknown cause",
    };
    format!("KVM gave up on the guest: internal error {}, {what}", error.suberror)
}
