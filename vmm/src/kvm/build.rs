//! Making a machine: one recipe, whose result is ready and paused.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bare::Bare;
use super::opened::Opened;
use super::run_control::{self, RunControl};
use super::vcpu::Shared;
use super::vm::VmError;
use super::{KvmMachine, cpuid, vcpu, vm};
use crate::boot::cmdline::{Console, MmioSlot, kernel_cmdline};
use crate::boot::{BootError, Description, Guest};
use crate::bus::Bus;
use crate::config::Config;
use crate::confine::{Kind, identity};
use crate::devices::blk::image::ImageError;
use crate::devices::net::NetError;
use crate::fs::Access;
use crate::fs::blocks::Blocks;
use crate::jail::{self, Apart};
use crate::legacy::serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS, SerialPort};
use crate::legacy::{
    CLOCK_PORT, CLOCK_PORTS, Clock, KEYBOARD_PORT, KEYBOARD_PORTS, KeyboardController, POWER_OFF_PORT,
    PowerSwitch,
};
use crate::memory::Layout;
use crate::timeline::Timeline;
use crate::virtio::event_loop::EventLoop;
use crate::virtio::mmio::{MmioDevice, WINDOW_BYTES};

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KVM refused a step.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The kernel or the image are no good.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk is no good.
    #[error(transparent)]
    Disk(#[from] ImageError),
    /// A tap is no good.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The jail could not be entered.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// The share could not be served.
    #[error(transparent)]
    Fs(#[from] crate::fs::Error),
    /// The vsock socket cannot be made.
    #[error("cannot make the vsock socket {path}: {why}")]
    VsockSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// The console file cannot be made.
    #[error("cannot write the console to {path}: {why}")]
    Console {
        /// The file.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// The host refused something that nearly always works.
    #[error("cannot {what}: {why}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why.
        why: std::io::Error,
    },
}

/// Marks a step in which the host refused something.
pub(super) fn host(what: &'static str) -> impl Fn(std::io::Error) -> StartError {
    move |why| StartError::Host { what, why }
}

impl KvmMachine {
    /// Makes a machine of a bare one whose guest is loaded: its vCPUs wait at their first instruction. The
    /// process is in its jail afterwards; it must have no other thread before.
    pub fn start(
        bare: Bare,
        guest: Guest,
        apart: &Apart,
        config: &Config,
        timeline: &mut Timeline,
    ) -> Result<Self, StartError> {
        let Bare { first, vm, layout, memory, supported, vcpus: count } = bare;
        let mut opened = Opened::open(config)?;
        timeline.step("open files");
        jail::enter(config.shares(), config.vsock().and_then(|vsock| vsock.socket.parent()), apart)?;
        if let Some(ids) = config.ids() {
            identity::take(ids.vmm).map_err(host("take ids of its own"))?;
        }
        timeline.step("enter the jail");

        let serial = opened.take_serial_port()?;
        let blocks = Blocks::default();
        let devices = opened.take_devices(config, &memory, &blocks)?;
        let mut shared = new_shared()?;
        attach_devices(&vm, &mut shared.memory_bus, &devices)?;
        attach_ports(&vm, &mut shared.port_bus, serial.as_ref())?;
        let slots: Vec<_> = (0..devices.len()).map(vm::mmio_slot).collect();
        let description = Description {
            cmdline: &cmdline(config, layout, &slots),
            vcpus: count,
            lines: &lines(&slots, serial.is_some()),
        };
        let entry = guest.describe(&memory, layout, &description)?;
        timeline.step("make devices");

        vcpu::set_entry(&first, entry)?;
        let others = (1..count).map(|id| vcpu::create(&vm, id, &cpuid::for_vcpu(&supported, id, count)));
        let vcpus = std::iter::once(Ok(first)).chain(others).collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(shared);
        let vcpus = start_vcpus(vcpus, &shared)?;
        let mut machine =
            Self { vcpus, shared, event_loops: Vec::new(), devices, blocks, serial, layout, memory, _vm: vm };
        machine.event_loops = start_event_loops(&machine.devices, config.share_access())?;
        timeline.step("create vCPUs and threads");
        Ok(machine)
    }
}

fn new_shared() -> Result<Shared, StartError> {
    Ok(Shared {
        memory_bus: Bus::default(),
        port_bus: Bus::default(),
        control: RunControl::default(),
        end: OnceLock::new(),
        ended: EventFd::new(EFD_NONBLOCK).map_err(host("make an eventfd"))?,
        exits: AtomicU64::new(0),
    })
}

fn attach_devices(vm: &VmFd, bus: &mut Bus, devices: &[Arc<MmioDevice>]) -> Result<(), StartError> {
    for (index, device) in devices.iter().enumerate() {
        let slot = vm::mmio_slot(index);
        vm::connect(vm, device, slot)?;
        bus.attach(slot.address, WINDOW_BYTES, Arc::clone(device) as _);
    }
    Ok(())
}

fn attach_ports(vm: &VmFd, bus: &mut Bus, serial: Option<&Arc<SerialPort>>) -> Result<(), StartError> {
    bus.attach(KEYBOARD_PORT.into(), KEYBOARD_PORTS.into(), Arc::new(KeyboardController));
    bus.attach(CLOCK_PORT.into(), CLOCK_PORTS.into(), Arc::new(Clock));
    bus.attach(POWER_OFF_PORT.into(), 1, Arc::new(PowerSwitch));
    if let Some(serial) = serial {
        let line = serial.interrupt_line().map_err(host("connect the serial port"))?;
        vm::connect_interrupt(vm, &line, SERIAL_IRQ)?;
        bus.attach(SERIAL_PORT.into(), SERIAL_PORTS.into(), Arc::clone(serial) as _);
    }
    Ok(())
}

fn cmdline(config: &Config, layout: Layout, slots: &[MmioSlot]) -> String {
    let console = if config.console().is_some() { Console::Serial } else { Console::None };
    kernel_cmdline(layout.panic_log(), console, slots, config.cmdline())
}

/// The interrupt lines in use.
fn lines(slots: &[MmioSlot], serial: bool) -> Vec<u8> {
    let serial = serial.then_some(SERIAL_IRQ);
    serial.into_iter().chain(slots.iter().map(|slot| slot.irq)).collect()
}

fn start_vcpus(
    vcpus: Vec<VcpuFd>,
    shared: &Arc<Shared>,
) -> Result<Vec<std::thread::JoinHandle<()>>, StartError> {
    run_control::install_signal().map_err(host("install a signal handler"))?;
    let mut threads = Vec::new();
    for (id, vcpu) in vcpus.into_iter().enumerate() {
        match vcpu::start(id, vcpu, Arc::clone(shared)) {
            Ok(thread) => threads.push(thread),
            Err(why) => {
                shared.control.end_all(threads);
                return Err(StartError::Host { what: "start a vCPU thread", why });
            }
        }
    }
    Ok(threads)
}

/// Devices that make file system calls have a thread of their own.
fn start_event_loops(devices: &[Arc<MmioDevice>], access: Access) -> Result<Vec<EventLoop>, StartError> {
    let (files, streams): (Vec<_>, Vec<_>) =
        devices.iter().cloned().partition(|device| device.name() == "fs" || device.name().starts_with("blk"));
    let mut loops =
        vec![EventLoop::start("devices", Kind::Devices, &streams).map_err(host("start the device thread"))?];
    if !files.is_empty() {
        let kind = Kind::Files(access);
        loops.push(EventLoop::start("files", kind, &files).map_err(host("start the file thread"))?);
    }
    Ok(loops)
}
