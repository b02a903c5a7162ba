//! The virtual machine as KVM sees it: memory slots, interrupt controllers, and what connects devices to them.

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::{Address as _, GuestMemory as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::cmdline::MmioSlot;
use crate::memory::{KVM_TSS, MMIO_START};
use crate::virtio::GuestMemory;
use crate::virtio::mmio::{MmioDevice, WINDOW_BYTES};
use crate::virtio::registers::QUEUE_NOTIFY;

/// The first interrupt line of a virtio device: those below belong to the PC's own devices.
const FIRST_IRQ: u8 = 5;

/// How often an interrupted KVM_CREATE_VM is tried again.
const CREATE_ATTEMPTS: u32 = 5;

/// A step of making a virtual machine that KVM refused.
#[derive(Debug, thiserror::Error)]
#[error("KVM cannot {step}: {why}")]
pub struct VmError {
    /// What was being done.
    pub step: &'static str,
    /// What KVM said.
    pub why: io::Error,
}

impl VmError {
    /// A step, and KVM's answer.
    pub fn of(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self { step, why: io::Error::from_raw_os_error(error.errno()) }
    }
}

/// Creates a virtual machine with nothing in it.
///
/// A signal to the calling thread can make KVM give up half-way; trying again is all it takes.
pub fn create(kvm: &Kvm) -> Result<VmFd, VmError> {
    let mut attempt = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempt < CREATE_ATTEMPTS => attempt += 1,
            result => return result.map_err(VmError::of("create a virtual machine")),
        }
    }
}

/// Gives it its memory.
pub fn add_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), VmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped, and stays so as long as the machine, which holds `memory`.
        unsafe { vm.set_user_memory_region(region) }.map_err(VmError::of("take the guest's memory"))?;
    }
    Ok(())
}

/// Gives it interrupt controllers, inside KVM. There is no timer chip: every processor that can have a guest has a
/// timer in its local controller, whose frequency the guest is told.
pub fn add_interrupt_controllers(vm: &VmFd) -> Result<(), VmError> {
    let tss = usize::try_from(KVM_TSS).unwrap_or(usize::MAX);
    vm.set_tss_address(tss).map_err(VmError::of("place its task state"))?;
    vm.create_irq_chip().map_err(VmError::of("make interrupt controllers"))
}

/// Where a device is, by its place in the order of devices.
pub fn mmio_slot(index: usize) -> MmioSlot {
    let index = u8::try_from(index).unwrap_or(u8::MAX);
    MmioSlot { address: MMIO_START + u64::from(index) * WINDOW_BYTES, irq: FIRST_IRQ.saturating_add(index) }
}

/// Connects a device's notifications and interrupt to eventfds.
pub fn connect(vm: &VmFd, device: &MmioDevice, slot: MmioSlot) -> Result<(), VmError> {
    connect_interrupt(vm, device.interrupt_line(), slot.irq)?;
    let address = IoEventAddress::Mmio(slot.address + QUEUE_NOTIFY);
    for (queue, event) in (0u32..).zip(device.notify_events()) {
        vm.register_ioevent(event, &address, queue).map_err(VmError::of("watch a device's notifications"))?;
    }
    Ok(())
}

/// Connects an eventfd to an interrupt line: each write is an edge.
pub fn connect_interrupt(vm: &VmFd, line: &EventFd, irq: u8) -> Result<(), VmError> {
    vm.register_irqfd(line, irq.into()).map_err(VmError::of("connect an interrupt line"))
}
