//! What the runtime asked for, checked.
//!
//! [`VmConfig`] is what came over the wire; a [`Config`] is one that holds together by itself. Whether its
//! files exist and can be opened is found out by the machine that opens them.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use sandbox_vmm_api::{
    DiskConfig, FIRST_TAP_FD, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, MachineChoice, NetConfig,
    ProcessIds, Rates, ShareEntry, TapSource, VmConfig, VsockConfig,
};

use crate::fs::Access;

/// The most bytes of a configuration: thousands of shares fit.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// The most bytes of the words added to the kernel's command line, which itself has 2,048.
const MAX_CMDLINE_BYTES: usize = 1024;

/// The most devices of a machine: as many as there are interrupt lines for them.
pub const MAX_DEVICES: usize = 19;

/// The most bytes of a network interface's name (`IFNAMSIZ` without its NUL).
const MAX_INTERFACE_NAME_BYTES: usize = 15;

/// The last id of a user; the number after it means "no change".
const LAST_ID: u32 = u32::MAX - 1;

/// The smallest context id of a guest: those below have fixed meanings.
const MIN_GUEST_CID: u32 = 3;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Standard input could not be read.
    #[error("cannot read the configuration from standard input: {0}")]
    Read(#[source] std::io::Error),
    /// It is longer than any sensible one.
    #[error("the configuration on standard input is longer than {MAX_CONFIG_BYTES} bytes")]
    TooLong,
    /// It is not a configuration.
    #[error("the configuration on standard input is not valid: {0}")]
    Parse(#[source] serde_json::Error),
    /// A number is out of its range.
    #[error("{field} is {value}: it must be from {least} to {most}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
    /// The command line has something that the kernel would not read as words.
    #[error("cmdline must be printable ASCII of at most {MAX_CMDLINE_BYTES} bytes")]
    Cmdline,
    /// A path that must be absolute is not.
    #[error("{field}: {path} is not an absolute path")]
    NotAbsolute {
        /// The field.
        field: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A place in the share is not a relative path of plain names.
    #[error("shares: {0} is not a relative path of plain names")]
    SharePath(PathBuf),
    /// Two entries claim one place in the share.
    #[error("shares: {0} is there twice, or lies inside another entry")]
    ShareOverlap(PathBuf),
    /// A MAC address is not one.
    #[error("nets: {mac:?} is not the MAC address of one host, like 02:00:00:00:00:01")]
    Mac {
        /// What was given.
        mac: String,
    },
    /// An interface name is not one.
    #[error("nets: {tap:?} is not the name of a network interface")]
    Tap {
        /// What was given.
        tap: String,
    },
    /// A tap is to be inherited under a number that has another use.
    #[error(
        "nets: descriptor {0} has another use: taps are inherited from {FIRST_TAP_FD} on, each under its own"
    )]
    TapDescriptor(i32),
    /// More devices than interrupt lines.
    #[error("{0} devices asked for: a machine has room for {MAX_DEVICES}")]
    TooManyDevices(usize),
}

/// A MAC address of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

/// A network interface.
#[derive(Clone, Debug)]
pub struct Net {
    /// The tap: a plausible name, or a descriptor that nothing else has.
    pub tap: TapSource,
    /// The guest's address.
    pub mac: MacAddress,
}

/// A configuration that holds together.
#[derive(Clone, Debug)]
pub struct Config {
    wire: VmConfig,
    nets: Vec<Net>,
}

impl Config {
    /// Reads and checks a configuration.
    pub fn read(input: impl Read) -> Result<Self, ConfigError> {
        let mut text = Vec::new();
        input.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(ConfigError::Read)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLong);
        }
        Self::check(serde_json::from_slice(&text).map_err(ConfigError::Parse)?)
    }

    /// Checks a configuration.
    pub fn check(wire: VmConfig) -> Result<Self, ConfigError> {
        range("memory_mib", wire.memory_mib.into(), MIN_MEMORY_MIB.into(), MAX_MEMORY_MIB.into())?;
        range("vcpus", wire.vcpus.into(), 1, MAX_VCPUS.into())?;
        if wire.cmdline.len() > MAX_CMDLINE_BYTES || !wire.cmdline.bytes().all(|b| (0x20..0x7f).contains(&b))
        {
            return Err(ConfigError::Cmdline);
        }
        absolute("kernel", &wire.kernel)?;
        absolute("image", &wire.image)?;
        absolute("control_socket", &wire.control_socket)?;
        if let Some(console) = &wire.console {
            absolute("console", console)?;
        }
        if let Some(vsock) = &wire.vsock {
            range("vsock.cid", vsock.cid.into(), MIN_GUEST_CID.into(), (u32::MAX - 1).into())?;
            absolute("vsock.socket", &vsock.socket)?;
        }
        for disk in &wire.disks {
            absolute("disks", &disk.path)?;
        }
        if let Some(ids) = wire.ids {
            range("ids.vmm", ids.vmm.into(), 1, LAST_ID.into())?;
            range("ids.qemu", ids.qemu.into(), 1, LAST_ID.into())?;
        }
        check_shares(&wire.shares)?;
        let nets = check_nets(&wire.nets)?;
        let config = Self { wire, nets };
        if config.device_count() > MAX_DEVICES {
            return Err(ConfigError::TooManyDevices(config.device_count()));
        }
        Ok(config)
    }

    /// How many virtio devices the machine has.
    pub fn device_count(&self) -> usize {
        let entropy = 1;
        let vsock = usize::from(self.wire.vsock.is_some());
        let share = usize::from(!self.wire.shares.is_empty());
        let balloon = usize::from(self.wire.balloon);
        entropy + vsock + share + balloon + self.wire.disks.len() + self.nets.len()
    }

    /// Which machine to run.
    pub fn machine(&self) -> MachineChoice {
        self.wire.machine
    }

    /// The guest kernel, an absolute path.
    pub fn kernel(&self) -> &Path {
        &self.wire.kernel
    }

    /// The guest image, an absolute path.
    pub fn image(&self) -> &Path {
        &self.wire.image
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.wire.memory_mib) << 20
    }

    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub fn vcpus(&self) -> u8 {
        self.wire.vcpus
    }

    /// Words added to the kernel's command line.
    pub fn cmdline(&self) -> &str {
        &self.wire.cmdline
    }

    /// The vsock device: a guest's context id and an absolute path.
    pub fn vsock(&self) -> Option<&VsockConfig> {
        self.wire.vsock.as_ref()
    }

    /// What devices do at most.
    pub fn rates(&self) -> Rates {
        self.wire.rates
    }

    /// The share's entries: relative paths of plain names, none inside another; absolute sources.
    pub fn shares(&self) -> &[ShareEntry] {
        &self.wire.shares
    }

    /// What the guest may do to the share, now or later.
    pub fn share_access(&self) -> Access {
        let writable = self.wire.writable_later || self.wire.shares.iter().any(|share| !share.read_only);
        if writable { Access::ReadWrite } else { Access::ReadOnly }
    }

    /// The ids that the processes take; neither is root's.
    pub fn ids(&self) -> Option<ProcessIds> {
        self.wire.ids
    }

    /// Disks, absolute paths.
    pub fn disks(&self) -> &[DiskConfig] {
        &self.wire.disks
    }

    /// Network interfaces.
    pub fn nets(&self) -> &[Net] {
        &self.nets
    }

    /// Whether there is a balloon.
    pub fn balloon(&self) -> bool {
        self.wire.balloon
    }

    /// The file of the serial console, an absolute path; none: no serial port.
    pub fn console(&self) -> Option<&Path> {
        self.wire.console.as_deref()
    }

    /// Where the control socket is made, an absolute path.
    pub fn control_socket(&self) -> &Path {
        &self.wire.control_socket
    }
}

fn range(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::Range { field, value, least, most })
    }
}

fn absolute(field: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() { Ok(()) } else { Err(ConfigError::NotAbsolute { field, path: path.to_owned() }) }
}

/// Entries may not lie inside each other: what one shows would depend on the order of mounting.
fn check_shares(shares: &[ShareEntry]) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for share in shares {
        absolute("shares", &share.source)?;
        let plain = share.path.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || share.path.as_os_str().is_empty() {
            return Err(ConfigError::SharePath(share.path.clone()));
        }
        if !seen.insert(share.path.as_path()) {
            return Err(ConfigError::ShareOverlap(share.path.clone()));
        }
    }
    for share in shares {
        if share.path.ancestors().skip(1).any(|above| seen.contains(above)) {
            return Err(ConfigError::ShareOverlap(share.path.clone()));
        }
    }
    Ok(())
}

fn check_nets(nets: &[NetConfig]) -> Result<Vec<Net>, ConfigError> {
    let mut descriptors = BTreeSet::new();
    for net in nets {
        if let TapSource::Descriptor(fd) = net.tap
            && (fd < FIRST_TAP_FD || !descriptors.insert(fd))
        {
            return Err(ConfigError::TapDescriptor(fd));
        }
    }
    nets.iter().map(check_net).collect()
}

fn check_net(net: &NetConfig) -> Result<Net, ConfigError> {
    if let TapSource::Name(tap) = &net.tap {
        check_interface_name(tap)?;
    }
    let mac = parse_mac(&net.mac).ok_or_else(|| ConfigError::Mac { mac: net.mac.clone() })?;
    Ok(Net { tap: net.tap.clone(), mac })
}

fn check_interface_name(tap: &str) -> Result<(), ConfigError> {
    let name = tap.as_bytes();
    let plain = name.iter().all(|b| b.is_ascii_graphic() && !b"/:".contains(b));
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME_BYTES || !plain || matches!(name, b"." | b"..") {
        return Err(ConfigError::Tap { tap: tap.to_owned() });
    }
    Ok(())
}

/// Group addresses (the lowest bit of the first byte) belong to no host.
fn parse_mac(text: &str) -> Option<MacAddress> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(MacAddress(mac))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
