//! Making a machine: one recipe, whose result is ready and paused.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use kvm_ioctls::{VcpuFd, VmFd};
use sandbox_vmm_api::SHARE_TAG;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bare::Bare;
use super::run_control::{self, RunControl};
use super::vcpu::Shared;
use super::vm::VmError;
use super::{KvmMachine, cpuid, vcpu, vm};
use crate::boot::cmdline::{Console, MmioSlot, kernel_cmdline};
use crate::boot::{self, BootError, Description, GuestFile};
use crate::bus::Bus;
use crate::config::Config;
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::blk::image::ImageError;
use crate::devices::net::{Net, NetError};
use crate::fs::Fs;
use crate::jail;
use crate::legacy::serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS, SerialPort};
use crate::legacy::{
    CLOCK_PORT, CLOCK_PORTS, Clock, KEYBOARD_PORT, KEYBOARD_PORTS, KeyboardController, POWER_OFF_PORT,
    PowerSwitch,
};
use crate::memory::Layout;
use crate::timeline::Timeline;
use crate::virtio::event_loop::EventLoop;
use crate::virtio::mmio::{MmioDevice, WINDOW_BYTES};
use crate::virtio::rng::Rng;
use crate::virtio::{GuestMemory, VirtioDevice};
use crate::vsock::Vsock;

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
fn host(what: &'static str) -> impl Fn(std::io::Error) -> StartError {
    move |why| StartError::Host { what, why }
}

/// What has to be opened before the jail hides it.
struct Opened {
    kernel: GuestFile,
    image: GuestFile,
    console: Option<File>,
    disks: Vec<Blk>,
    nets: Vec<Net>,
    vsock: Option<UnixListener>,
    descriptors: File,
}

impl KvmMachine {
    /// Makes a machine: its guest is loaded, its vCPUs wait at their first instruction. The process is in its
    /// jail afterwards; it must have had no other thread before.
    pub fn start(bare: Bare, config: &Config, timeline: &mut Timeline) -> Result<Self, StartError> {
        let Bare { first, vm, layout, memory, supported, vcpus: count } = bare;
        let mut opened = open_all(config)?;
        timeline.step("open files");
        jail::enter(config.shares(), config.vsock().and_then(|vsock| vsock.socket.parent()))?;
        timeline.step("enter the jail");

        let devices = make_devices(config, &memory, &mut opened)?;
        let serial =
            opened.console.take().map(SerialPort::new).transpose().map_err(host("make a serial port"))?;
        let serial = serial.map(Arc::new);
        let mut shared = new_shared()?;
        attach_devices(&vm, &mut shared.memory_bus, &devices)?;
        attach_ports(&vm, &mut shared.port_bus, serial.as_ref())?;
        timeline.step("make devices");

        let slots: Vec<_> = (0..devices.len()).map(vm::mmio_slot).collect();
        let description = Description {
            cmdline: &cmdline(config, layout, &slots),
            vcpus: count,
            lines: &lines(&slots, serial.is_some()),
        };
        let entry = boot::load(&memory, layout, &mut opened.kernel, &mut opened.image, &description)?;
        timeline.step("load the kernel and the image");

        vcpu::set_entry(&first, entry)?;
        let others = (1..count).map(|id| vcpu::create(&vm, id, &cpuid::for_vcpu(&supported, id, count)));
        let vcpus = std::iter::once(Ok(first)).chain(others).collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(shared);
        let vcpus = start_vcpus(vcpus, &shared)?;
        let mut machine =
            Self { vcpus, shared, event_loops: Vec::new(), devices, serial, layout, memory, _vm: vm };
        machine.event_loops = start_event_loops(&machine.devices)?;
        timeline.step("create vCPUs and threads");
        Ok(machine)
    }
}

fn open_all(config: &Config) -> Result<Opened, StartError> {
    let disks = config.disks().iter().enumerate().map(|(index, disk)| Blk::open(index, disk));
    let nets = config.nets().iter().enumerate().map(|(index, net)| Net::open(index, net));
    let vsock = config.vsock().map(|vsock| listen_vsock(&vsock.socket)).transpose()?;
    Ok(Opened {
        kernel: GuestFile::kernel(config.kernel())?,
        image: GuestFile::image(config.image())?,
        console: config.console().map(open_console).transpose()?,
        disks: disks.collect::<Result<_, _>>()?,
        nets: nets.collect::<Result<_, _>>()?,
        vsock,
        descriptors: File::open("/proc/self/fd").map_err(host("open /proc/self/fd"))?,
    })
}

fn open_console(path: &Path) -> Result<File, StartError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .map_err(|why| StartError::Console { path: path.to_owned(), why })
}

fn listen_vsock(path: &Path) -> Result<UnixListener, StartError> {
    UnixListener::bind(path).map_err(|why| StartError::VsockSocket { path: path.to_owned(), why })
}

/// All devices, in the order in which the guest finds them.
fn make_devices(
    config: &Config,
    memory: &GuestMemory,
    opened: &mut Opened,
) -> Result<Vec<Arc<MmioDevice>>, StartError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::default())];
    if let (Some(vsock), Some(listener)) = (config.vsock(), opened.vsock.take()) {
        let device =
            Vsock::new(vsock.cid, listener, in_jail(&vsock.socket)).map_err(host("make the vsock device"))?;
        devices.push(Box::new(device));
    }
    if !config.shares().is_empty() {
        let descriptors = opened.descriptors.try_clone().map_err(host("keep /proc/self/fd"))?;
        devices.push(Box::new(Fs::new(SHARE_TAG, Path::new(jail::SHARE), descriptors)?));
    }
    for disk in opened.disks.drain(..) {
        devices.push(Box::new(disk));
    }
    for net in opened.nets.drain(..) {
        devices.push(Box::new(net));
    }
    if config.balloon() {
        devices.push(Box::new(Balloon::new()));
    }
    devices
        .into_iter()
        .map(|device| MmioDevice::new(device, memory.clone()).map(Arc::new))
        .collect::<Result<_, _>>()
        .map_err(host("make an eventfd"))
}

/// Where the jail has the vsock socket.
fn in_jail(socket: &Path) -> PathBuf {
    Path::new(jail::VSOCK).join(socket.file_name().unwrap_or_default())
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
fn start_event_loops(devices: &[Arc<MmioDevice>]) -> Result<Vec<EventLoop>, StartError> {
    let (files, streams): (Vec<_>, Vec<_>) =
        devices.iter().cloned().partition(|device| device.name() == "fs" || device.name().starts_with("blk"));
    let mut loops = vec![EventLoop::start("devices", &streams).map_err(host("start the device thread"))?];
    if !files.is_empty() {
        loops.push(EventLoop::start("files", &files).map_err(host("start the file thread"))?);
    }
    Ok(loops)
}
