//! What a machine takes from the host: opened before the jail hides it, made into devices afterwards.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sandbox_vmm_api::{RateLimit, Rates, SHARE_TAG, socket};

use super::build::{StartError, host};
use crate::config::Config;
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::net::Net;
use crate::fs::Fs;
use crate::fs::blocks::Blocks;
use crate::jail;
use crate::legacy::serial::SerialPort;
use crate::virtio::mmio::MmioDevice;
use crate::virtio::rate::Limiter;
use crate::virtio::rng::Rng;
use crate::virtio::{GuestMemory, VirtioDevice};
use crate::vsock::Vsock;

/// Everything that is open.
pub struct Opened {
    console: Option<File>,
    disks: Vec<Blk>,
    nets: Vec<Net>,
    vsock: Option<UnixListener>,
    descriptors: File,
}

impl Opened {
    /// Opens everything that a machine needs.
    pub fn open(config: &Config) -> Result<Self, StartError> {
        let disks = config.disks().iter().enumerate().map(|(index, disk)| Blk::open(index, disk));
        let nets = config.nets().iter().enumerate().map(|(index, net)| Net::open(index, net));
        let vsock = config.vsock().map(|vsock| listen_vsock(&vsock.socket)).transpose()?;
        Ok(Self {
            console: config.console().map(open_console).transpose()?,
            disks: disks.collect::<Result<_, _>>()?,
            nets: nets.collect::<Result<_, _>>()?,
            vsock,
            descriptors: File::open("/proc/self/fd").map_err(host("open /proc/self/fd"))?,
        })
    }

    /// The serial port, where there is to be one.
    pub fn take_serial_port(&mut self) -> Result<Option<Arc<SerialPort>>, StartError> {
        let port =
            self.console.take().map(SerialPort::new).transpose().map_err(host("make a serial port"))?;
        Ok(port.map(Arc::new))
    }

    /// All virtio devices, in the order in which the guest finds them; its share has these `blocks` besides. To be
    /// called in the jail.
    pub fn take_devices(
        &mut self,
        config: &Config,
        memory: &GuestMemory,
        blocks: &Blocks,
    ) -> Result<Vec<Arc<MmioDevice>>, StartError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::default())];
        if let (Some(vsock), Some(listener)) = (config.vsock(), self.vsock.take()) {
            let device = Vsock::new(vsock.cid, listener, in_jail(&vsock.socket))
                .map_err(host("make the vsock device"))?;
            devices.push(Box::new(device));
        }
        if !config.shares().is_empty() {
            let descriptors = self.descriptors.try_clone().map_err(host("keep /proc/self/fd"))?;
            let root = Path::new(jail::SHARE);
            let share = Fs::new(SHARE_TAG, root, config.share_access(), descriptors, blocks.clone())?;
            devices.push(Box::new(share));
        }
        for disk in self.disks.drain(..) {
            devices.push(Box::new(disk));
        }
        for net in self.nets.drain(..) {
            devices.push(Box::new(net));
        }
        if config.balloon() {
            devices.push(Box::new(Balloon::new()));
        }
        devices
            .into_iter()
            .map(|device| {
                let limiter = Limiter::new(rate_of(device.name(), &config.rates()))?;
                MmioDevice::new(device, memory.clone(), limiter).map(Arc::new)
            })
            .collect::<Result<_, _>>()
            .map_err(host("make an eventfd or a timer"))
    }
}

/// The limit of the device with this name.
fn rate_of(name: &str, rates: &Rates) -> RateLimit {
    match name {
        "vsock" => rates.vsock,
        "fs" => rates.share,
        name if name.starts_with("blk") => rates.disks,
        name if name.starts_with("net") => rates.nets,
        _ => RateLimit::default(),
    }
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
    socket::bind(path).map_err(|why| StartError::VsockSocket { path: path.to_owned(), why })
}

/// Where the jail has the vsock socket.
fn in_jail(socket: &Path) -> PathBuf {
    Path::new(jail::VSOCK).join(socket.file_name().unwrap_or_default())
}
