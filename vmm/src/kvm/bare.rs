//! A virtual machine with nothing in it but memory, interrupt controllers and its first vCPU.
//!
//! This much is needed to find out whether KVM is any good here. A machine is built on the one that was tried:
//! making a second one, and taking the first apart, would cost more than all the rest of a start.

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::open::{self, KvmUnusable};
use super::vm::{self, VmError};
use super::{cpuid, vcpu};
use crate::memory::Layout;
use crate::virtio::GuestMemory;

/// The bare machine. The virtual machine goes before its memory.
pub struct Bare {
    /// The first vCPU, in 32-bit protected mode.
    pub first: VcpuFd,
    /// The virtual machine.
    pub vm: VmFd,
    /// Where its memory is.
    pub layout: Layout,
    /// Its memory.
    pub memory: GuestMemory,
    /// What the processor can do under KVM.
    pub supported: CpuId,
    /// How many vCPUs it will have.
    pub vcpus: u8,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum BareError {
    /// KVM cannot be opened.
    #[error(transparent)]
    Open(#[from] KvmUnusable),
    /// KVM refused a step.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// More vCPUs than the host's KVM allows.
    #[error("{asked} vCPUs asked for: this host's KVM allows {most}")]
    TooManyVcpus {
        /// What was asked for.
        asked: u8,
        /// What there can be.
        most: usize,
    },
}

impl Bare {
    /// Makes one with this memory, which nothing of KVM's writes to.
    pub fn new(layout: Layout, memory: GuestMemory, vcpus: u8) -> Result<Self, BareError> {
        let kvm = open::open()?;
        check_vcpus(&kvm, vcpus)?;
        let vm = vm::create(&kvm)?;
        vm::add_memory(&vm, &memory)?;
        vm::add_interrupt_controllers(&vm)?;
        let supported = cpuid::supported(&kvm).map_err(VmError::of("list the processor's features"))?;
        let first = vcpu::create(&vm, 0, &cpuid::for_vcpu(&supported, 0, vcpus))?;
        vcpu::set_protected_mode(&first)?;
        Ok(Self { first, vm, layout, memory, supported, vcpus })
    }
}

fn check_vcpus(kvm: &Kvm, asked: u8) -> Result<(), BareError> {
    let most = kvm.get_max_vcpus();
    if usize::from(asked) > most { Err(BareError::TooManyVcpus { asked, most }) } else { Ok(()) }
}
