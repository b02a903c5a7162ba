//! A vCPU and its thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::failure;
use super::run_control::{Command, RunControl};
use super::vm::VmError;
use crate::boot::{Entry, registers};
use crate::bus::{Access, Bus};
use crate::confine::{self, Kind};

/// The bytes of a vCPU thread's stack.
const STACK_BYTES: usize = 256 << 10;

/// Model-specific registers that differ from their reset values.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Memory is cached write-back, and these registers count.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// How a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It cut its power.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its processor gave up.
    TripleFault,
    /// It cannot go on, and the message says why.
    Failed(String),
}

/// What all vCPUs of a machine share.
pub struct Shared {
    /// Who answers memory-mapped accesses.
    pub memory_bus: Bus,
    /// Who answers port accesses.
    pub port_bus: Bus,
    /// Whether to run.
    pub control: RunControl,
    /// How the guest ended, once it has.
    pub end: OnceLock<GuestEnd>,
    /// Signalled when it has.
    pub ended: EventFd,
    /// Exits to user space.
    pub exits: AtomicU64,
}

impl Shared {
    /// The guest has ended; the first report counts.
    fn report(&self, end: GuestEnd) {
        if self.end.set(end).is_ok()
            && let Err(error) = self.ended.write(1)
        {
            tracing::error!(%error, "cannot report the guest's end");
        }
    }
}

/// Makes a vCPU. All but the first wait to be started by it.
pub fn create(vm: &VmFd, id: u8, cpuid: &CpuId) -> Result<VcpuFd, VmError> {
    let vcpu = vm.create_vcpu(id.into()).map_err(VmError::of("create a vCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(VmError::of("set a vCPU's features"))?;
    set_msrs(&vcpu)?;
    Ok(vcpu)
}

/// Puts a vCPU into 32-bit protected mode.
pub fn set_protected_mode(vcpu: &VcpuFd) -> Result<(), VmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmError::of("read a vCPU's segments"))?;
    registers::set_protected_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(VmError::of("set a vCPU's segments"))
}

/// Sets where a vCPU starts, and the mode in which Linux is entered.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), VmError> {
    let mut sregs = vcpu.get_sregs().map_err(VmError::of("read a vCPU's segments"))?;
    registers::set_long_mode(&mut sregs, entry);
    vcpu.set_sregs(&sregs).map_err(VmError::of("set a vCPU's segments"))?;
    let general = registers::general(entry.instruction.0, entry.zero_page.0);
    vcpu.set_regs(&general).map_err(VmError::of("set a vCPU's registers"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), VmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| VmError { step: "set a vCPU's MSRs", why: std::io::ErrorKind::OutOfMemory.into() })?;
    let set = vcpu.set_msrs(&msrs).map_err(VmError::of("set a vCPU's MSRs"))?;
    if set < entries.len() {
        tracing::debug!(set, "the processor lacks an MSR");
    }
    Ok(())
}

/// Starts a vCPU's thread, which waits to be let run.
pub fn start(id: usize, vcpu: VcpuFd, shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("vcpu{id}")).stack_size(STACK_BYTES).spawn(move || {
        confine::enter(Kind::Vcpu);
        run(vcpu, &shared);
        shared.control.ended();
    })
}

fn run(mut vcpu: VcpuFd, shared: &Shared) {
    let mut was_held = false;
    loop {
        match shared.control.command() {
            Command::End => return,
            Command::Hold => {
                finish_access(&mut vcpu);
                shared.control.hold();
                was_held = true;
            }
            Command::Run => {
                if std::mem::take(&mut was_held) {
                    // Tells the guest's watchdogs that the time was not theirs; guests without KVM's clock
                    // have none to tell.
                    let _ = vcpu.kvmclock_ctrl();
                }
                if let Some(end) = step(&mut vcpu, shared) {
                    shared.report(end);
                    return;
                }
            }
        }
    }
}

/// Lets KVM finish an access that user space has answered, without running the guest.
fn finish_access(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
}

/// Runs the guest until it needs something, and does it.
fn step(vcpu: &mut VcpuFd, shared: &Shared) -> Option<GuestEnd> {
    let result = vcpu.run();
    shared.exits.fetch_add(1, Ordering::Relaxed);
    let exit = match result {
        Ok(exit) => exit,
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return None,
        Err(error) => {
            let why = std::io::Error::from_raw_os_error(error.errno());
            return Some(GuestEnd::Failed(failure::describe(vcpu, &format!("KVM cannot run a vCPU: {why}"))));
        }
    };
    let access = match exit {
        VcpuExit::MmioRead(address, data) => {
            shared.memory_bus.read(address, data);
            Access::Done
        }
        VcpuExit::MmioWrite(address, data) => shared.memory_bus.write(address, data),
        VcpuExit::IoIn(port, data) => {
            shared.port_bus.read(port.into(), data);
            Access::Done
        }
        VcpuExit::IoOut(port, data) => shared.port_bus.write(port.into(), data),
        VcpuExit::Intr => Access::Done,
        VcpuExit::Shutdown => return Some(GuestEnd::TripleFault),
        VcpuExit::InternalError => {
            let what = failure::internal_error(vcpu);
            return Some(GuestEnd::Failed(failure::describe(vcpu, &what)));
        }
        VcpuExit::FailEntry(reason, cpu) => {
            let what =
                format!("the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})");
            return Some(GuestEnd::Failed(failure::describe(vcpu, &what)));
        }
        other => {
            let what = format!("a vCPU left the guest for a reason that is not handled: {other:?}");
            return Some(GuestEnd::Failed(failure::describe(vcpu, &what)));
        }
    };
    match access {
        Access::Done => None,
        Access::PowerOff => Some(GuestEnd::PowerOff),
        Access::Reset => Some(GuestEnd::Reset),
    }
}

#[cfg(test)]
#[path = "vcpu_tests.rs"]
mod tests;
