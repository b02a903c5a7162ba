//! The virtio-mmio transport: one device at one page of guest physical memory.
//!
//! Two kinds of thread meet here. vCPU threads read and write [`Registers`]; the device's event loop runs the
//! device when a queue is notified (through an ioeventfd, without a vCPU leaving the kernel) or one of its own
//! descriptors is ready. A lock holds device, registers and queues together. The interrupt status stands
//! outside the lock, so that a guest handling an interrupt never waits for a device at work.
//!
//! Interrupts are edges: the used ring is written, then the status bit, then the irqfd. A driver reads the
//! status, acknowledges it, and only then looks at its rings, so nothing is lost when two edges fall together.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::rate::Limiter;
use super::registers::{
    CONFIG_SPACE, Effect, INTERRUPT_ACK, INTERRUPT_STATUS, QUEUE_NOTIFY, QueuePlan, Registers,
};
use super::{BrokenRing, GuestMemory, Signals, VirtioDevice};
use crate::bus::{Access, BusDevice};

/// The bytes of guest physical address space that a device takes.
pub const WINDOW_BYTES: u64 = 0x1000;

/// How often, and how long apart, a device at work is asked for its counters.
const STATISTICS_ATTEMPTS: u32 = 1000;
const STATISTICS_PAUSE: Duration = Duration::from_micros(100);

/// Bits of the interrupt status register.
const USED_RING: u32 = 1;
const CONFIGURATION: u32 = 2;

/// The line to the guest's interrupt controller.
#[derive(Debug)]
struct Interrupt {
    status: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    fn raise(&self, why: u32) {
        self.status.fetch_or(why, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            tracing::warn!(%error, "cannot interrupt the guest");
        }
    }
}

/// What the lock protects.
struct Inner {
    registers: Registers,
    device: Box<dyn VirtioDevice>,
    /// The live queues; `None` outside the time between DRIVER_OK and a reset, or after a broken ring.
    queues: Option<Vec<Queue>>,
    limiter: Option<Limiter>,
}

/// A device behind its registers.
pub struct MmioDevice {
    name: String,
    memory: GuestMemory,
    inner: Mutex<Inner>,
    interrupt: Interrupt,
    notify: Vec<EventFd>,
    activated: EventFd,
    event_fds: Vec<RawFd>,
    timer: Option<RawFd>,
}

impl MmioDevice {
    /// Puts a device behind registers.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        limiter: Option<Limiter>,
    ) -> io::Result<Self> {
        let registers = Registers::new(device.device_type(), device.features(), device.queue_sizes());
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self {
            name: device.name().to_owned(),
            memory,
            interrupt: Interrupt { status: AtomicU32::new(0), line: event()? },
            notify: device.queue_sizes().iter().map(|_| event()).collect::<io::Result<_>>()?,
            activated: event()?,
            event_fds: device.event_fds(),
            timer: limiter.as_ref().map(Limiter::timer),
            inner: Mutex::new(Inner { registers, device, queues: None, limiter }),
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What raises its interrupt.
    pub fn interrupt_line(&self) -> &EventFd {
        &self.interrupt.line
    }

    /// What the guest's notifications of each queue signal.
    pub fn notify_events(&self) -> &[EventFd] {
        &self.notify
    }

    /// Signalled when the driver has brought the device up.
    pub fn activated_event(&self) -> &EventFd {
        &self.activated
    }

    /// The device's own descriptors.
    pub fn event_fds(&self) -> &[RawFd] {
        &self.event_fds
    }

    /// What is readable when a device that had used up its rate is to be run as if it had been activated.
    pub fn timer(&self) -> Option<RawFd> {
        self.timer
    }

    /// The device's counters; none but `busy` when it does not return from the host in time.
    pub fn statistics(&self) -> BTreeMap<String, u64> {
        for _ in 0..STATISTICS_ATTEMPTS {
            match self.inner.try_lock() {
                Ok(inner) => return inner.device.statistics(),
                Err(_) => std::thread::sleep(STATISTICS_PAUSE),
            }
        }
        BTreeMap::from([("busy".to_owned(), 1)])
    }

    /// The driver has brought the device up: catch up with what happened before.
    pub fn run_activated(&self) {
        for &fd in &self.event_fds {
            self.run_ready(fd);
        }
        for queue in 0..self.notify.len() {
            self.run_notified(queue);
        }
    }

    /// A queue was notified.
    pub fn run_notified(&self, queue: usize) {
        self.run(|device, queues, memory| {
            if queues.get(queue).is_some_and(|queue| queue.ready()) {
                device.notified(queue, queues, memory)
            } else {
                Ok(Signals::NONE)
            }
        });
    }

    /// One of the device's descriptors is ready.
    pub fn run_ready(&self, fd: RawFd) {
        self.run(|device, queues, memory| device.ready(fd, queues, memory));
    }

    fn run(
        &self,
        step: impl FnOnce(&mut dyn VirtioDevice, &mut [&mut Queue], &GuestMemory) -> Result<Signals, BrokenRing>,
    ) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(queues) = &mut inner.queues else { return };
        let mut queues: Vec<&mut Queue> = queues.iter_mut().collect();
        let step = || step(inner.device.as_mut(), &mut queues, &self.memory);
        let result = match &mut inner.limiter {
            Some(limiter) => limiter.run(step),
            None => step(),
        };
        match result {
            Ok(signals) if signals.is_empty() => {}
            Ok(_) => self.interrupt.raise(USED_RING),
            Err(error) => self.give_up(inner, &error),
        }
    }

    /// One policy for a broken ring: the device stops, and the driver is told to reset it.
    fn give_up(&self, inner: &mut Inner, why: &dyn std::fmt::Display) {
        tracing::warn!(device = %self.name, "the guest broke the device: {why}");
        inner.queues = None;
        inner.registers.set_needs_reset();
        self.interrupt.raise(CONFIGURATION);
    }

    fn activate(&self, inner: &mut Inner) {
        let features = inner.registers.accepted();
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues: Result<Vec<Queue>, String> = inner
            .registers
            .queues()
            .iter()
            .enumerate()
            .map(|(index, plan)| {
                live_queue(plan, event_idx, &self.memory).map_err(|why| format!("queue {index}: {why}"))
            })
            .collect();
        match queues {
            Ok(queues) => {
                inner.device.activate(features);
                inner.queues = Some(queues);
                if let Err(error) = self.activated.write(1) {
                    tracing::warn!(device = %self.name, %error, "cannot wake the device");
                }
            }
            Err(why) => self.give_up(inner, &why),
        }
    }

    fn reset(&self, inner: &mut Inner) {
        inner.queues = None;
        inner.device.reset();
        self.interrupt.status.store(0, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A device that panicked aborts the process in release builds; in tests the next user may see it.
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            INTERRUPT_STATUS => self.interrupt.status.load(Ordering::SeqCst),
            _ => self.lock().registers.read(offset),
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            INTERRUPT_ACK => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            // An ioeventfd takes the notifications of existing queues; those of others mean nothing.
            QUEUE_NOTIFY => {
                if let Some(event) = usize::try_from(value).ok().and_then(|queue| self.notify.get(queue)) {
                    let _ = event.write(1);
                }
            }
            _ => {
                let mut inner = self.lock();
                match inner.registers.write(offset, value) {
                    Effect::None => {}
                    Effect::Activate => self.activate(&mut inner),
                    Effect::Reset => self.reset(&mut inner),
                }
            }
        }
    }
}

impl BusDevice for MmioDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_SPACE {
            self.lock().device.read_config(offset - CONFIG_SPACE, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        if offset >= CONFIG_SPACE {
            self.lock().device.write_config(offset - CONFIG_SPACE, data);
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
        Access::Done
    }
}

/// The live queue of a plan, checked: aligned, and all three tables in memory.
fn live_queue(plan: &QueuePlan, event_idx: bool, memory: &GuestMemory) -> Result<Queue, &'static str> {
    let mut queue = Queue::new(plan.max_size).map_err(|_| "its largest size is not a power of two")?;
    if !plan.ready {
        return Ok(queue);
    }
    queue.try_set_size(plan.size).map_err(|_| "its size is not a power of two")?;
    let size = usize::from(plan.size);
    let table = |address: u64, len: usize| memory.get_slice(GuestAddress(address), len).map(drop);
    table(plan.descriptors, 16 * size).map_err(|_| "its descriptor table is not in memory")?;
    table(plan.available, 6 + 2 * size).map_err(|_| "its available ring is not in memory")?;
    table(plan.used, 6 + 8 * size).map_err(|_| "its used ring is not in memory")?;
    queue
        .try_set_desc_table_address(GuestAddress(plan.descriptors))
        .map_err(|_| "its descriptor table is not aligned to 16 bytes")?;
    queue
        .try_set_avail_ring_address(GuestAddress(plan.available))
        .map_err(|_| "its available ring is not aligned to 2 bytes")?;
    queue
        .try_set_used_ring_address(GuestAddress(plan.used))
        .map_err(|_| "its used ring is not aligned to 4 bytes")?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    Ok(queue)
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
