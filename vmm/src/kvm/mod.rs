//! The machine on KVM.
//!
//! Its threads: one per vCPU, one for the devices that move bytes between queues and descriptors, one for
//! those that do file system calls (virtio-fs and disks), so that a slow disk holds up no network. The thread
//! that made the machine drives it.

mod bare;
mod build;
mod cpuid;
mod failure;
pub mod load;
pub mod open;
mod opened;
pub mod probe;
mod run_control;
mod vcpu;
mod vm;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use kvm_ioctls::VmFd;
use sandbox_vmm_api::{ExitReason, MachineKind, Statistics};

use crate::fs::blocks::Blocks;
use crate::legacy::serial::SerialPort;
use crate::machine::{Machine, MachineError};
use crate::memory::Layout;
use crate::panic_log;
use crate::virtio::GuestMemory;
use crate::virtio::event_loop::EventLoop;
use crate::virtio::mmio::MmioDevice;

pub use build::StartError;
use vcpu::{GuestEnd, Shared};

/// The machine on KVM.
pub struct KvmMachine {
    /// Empty once stopped.
    vcpus: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
    event_loops: Vec<EventLoop>,
    devices: Vec<Arc<MmioDevice>>,
    blocks: Blocks,
    serial: Option<Arc<SerialPort>>,
    layout: Layout,
    memory: GuestMemory,
    /// After the threads that use it, and before the memory that it maps.
    _vm: VmFd,
}

impl KvmMachine {
    fn judge(&self, end: Option<&GuestEnd>) -> ExitReason {
        match end {
            None => ExitReason::Stopped,
            Some(GuestEnd::PowerOff) => ExitReason::PowerOff,
            Some(GuestEnd::Failed(message)) => ExitReason::Failed { message: message.clone() },
            Some(end @ (GuestEnd::Reset | GuestEnd::TripleFault)) => match self.panic_record() {
                Some(console) => ExitReason::Panic { console },
                None if *end == GuestEnd::Reset => ExitReason::Reset,
                None => ExitReason::TripleFault,
            },
        }
    }

    fn panic_record(&self) -> Option<Vec<String>> {
        use vm_memory::{Bytes, GuestAddress};
        let extent = self.layout.panic_log();
        let mut region = vec![0; usize::try_from(extent.len).unwrap_or(0)];
        self.memory.read_slice(&mut region, GuestAddress(extent.start)).ok()?;
        panic_log::parse(&region)
    }
}

impl Machine for KvmMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Kvm
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.shared.control.run();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.shared
            .control
            .hold_all(&self.vcpus)
            .map_err(|stuck| MachineError::new("pausing the vCPUs", stuck))
    }

    fn statistics(&mut self) -> Result<Statistics, MachineError> {
        let resident = crate::memory::resident_bytes(&self.memory)
            .map_err(|error| MachineError::new("measuring guest memory", error))?;
        let mut devices: BTreeMap<_, _> =
            self.devices.iter().map(|device| (device.name().to_owned(), device.statistics())).collect();
        if let Some(serial) = &self.serial {
            devices.insert("console".to_owned(), serial.statistics());
        }
        let reported = devices.get("balloon").and_then(|balloon| balloon.get("reported_bytes")).copied();
        Ok(Statistics {
            memory_resident_bytes: resident,
            memory_reported_bytes: reported.unwrap_or(0),
            vcpu_exits: self.shared.exits.load(Ordering::Relaxed),
            devices,
        })
    }

    fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn stop(&mut self) {
        self.shared.control.end_all(std::mem::take(&mut self.vcpus));
        self.event_loops.clear();
    }

    fn ended(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as `shared`, which `self` holds.
        unsafe { BorrowedFd::borrow_raw(self.shared.ended.as_raw_fd()) }
    }

    fn exit_reason(&mut self) -> ExitReason {
        self.stop();
        self.judge(self.shared.end.get())
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        self.stop();
    }
}
