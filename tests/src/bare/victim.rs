//! The devices that are attacked, each with a proper request to it.

use std::fs;
use std::path::Path;
use std::process::Command;

use sandbox_vmm_api::{DiskConfig, NetConfig, ShareEntry, TapSource, VmConfig};

use super::Script;
use super::virtio::{DATA, Ring, device};
use crate::place::on_kvm;

/// The size of each ring.
pub const SIZE: u16 = 8;

/// `VIRTIO_F_INDIRECT_DESC`, a feature that not all devices offer.
pub const INDIRECT: u32 = 1 << 28;

/// A device, and a proper request to it.
pub struct Victim {
    /// What it is called here.
    pub name: &'static str,
    /// Its identity (virtio 1.2, 5).
    pub identity: u32,
    /// How many queues it has.
    pub queues: u32,
    /// The queue that requests go to.
    pub live: usize,
    /// The others that the device looks at whenever it is told to.
    pub heeded: &'static [usize],
    /// Those that it looks at when it has something for them, or never.
    pub unheeded: &'static [usize],
    /// What the device offers of [`INDIRECT`].
    pub features: u32,
    /// The request: bytes that the device reads, and the length of what it writes.
    pub request: (&'static [u8], u32),
}

/// Any number of random bytes.
pub const RNG: Victim = Victim {
    name: "rng",
    identity: device::RNG,
    queues: 1,
    live: 0,
    heeded: &[],
    unheeded: &[],
    features: 0,
    request: (&[], 16),
};

/// A read of the first sector.
pub const BLK: Victim = Victim {
    name: "blk",
    identity: device::BLK,
    queues: 1,
    live: 0,
    heeded: &[],
    unheeded: &[],
    features: INDIRECT,
    request: (&[0; 16], 513),
};

/// A frame that nobody is meant by.
pub const NET: Victim = Victim {
    name: "net",
    identity: device::NET,
    queues: 2,
    live: 1,
    heeded: &[],
    unheeded: &[0],
    features: INDIRECT,
    request: (&[0; 12 + 60], 0),
};

/// The balloon's queue by which its driver reports free memory.
pub const REPORTS: usize = 2;

/// A page that the guest does not have.
pub const BALLOON: Victim = Victim {
    name: "balloon",
    identity: device::BALLOON,
    queues: 3,
    live: 0,
    heeded: &[1, REPORTS],
    unheeded: &[],
    features: 0,
    request: (&[0xff; 4], 0),
};

/// A packet of nobody.
pub const VSOCK: Victim = Victim {
    name: "vsock",
    identity: device::VSOCK,
    queues: 3,
    live: 1,
    heeded: &[],
    unheeded: &[0, 2],
    features: INDIRECT,
    request: (&[0; 44], 0),
};

/// `GETATTR` of the root, before `INIT`.
const GETATTR: [u8; 56] = {
    let mut request = [0; 56];
    (request[0], request[4], request[16]) = (56, 3, 1);
    request
};

/// The attributes of the root.
pub const FS: Victim = Victim {
    name: "fs",
    identity: device::FS,
    queues: 2,
    live: 1,
    heeded: &[0],
    unheeded: &[],
    features: INDIRECT,
    request: (&GETATTR, 120),
};

/// Every device of ours that the machine of this run has: on the software machine, the others are QEMU's.
pub fn victims() -> Vec<Victim> {
    if on_kvm() { vec![RNG, BLK, NET, BALLOON, VSOCK, FS] } else { vec![VSOCK, FS] }
}

impl Victim {
    /// Its queues, which are empty.
    pub fn rings(&self) -> Vec<Ring> {
        (0..self.queues).map(|index| Ring::new(index, SIZE)).collect()
    }

    /// Has the device serve a proper request, for a driver that starts anew.
    pub fn expect_service(&self, script: &mut Script) {
        let mut rings = self.rings();
        script.bring_up(self.features, &mut rings);
        let (readable, writable) = self.request;
        script.ask(&mut rings[self.live], readable, (DATA + 0x1000, writable));
        script.say(".");
    }
}

/// Gives a machine every device that it can have.
///
/// # Panics
///
/// When a disk or a directory cannot be made.
pub fn all_devices(config: &mut VmConfig, directory: &Path, tap: &Tap) {
    let disk = directory.join("disk");
    fs::write(&disk, [0x5a; 64 << 10]).expect("a disk can be written");
    config.disks = vec![DiskConfig { path: disk, read_only: false }];
    let share = directory.join("shared");
    fs::create_dir(&share).expect("a directory can be made");
    config.shares = vec![ShareEntry { path: "shared".into(), source: share, read_only: false, id_map: None }];
    let tap = TapSource::Name(tap.0.clone());
    config.nets = vec![NetConfig { tap, mac: "02:00:00:00:00:01".into() }];
    config.balloon = true;
}

/// A tap that is there as long as this is.
pub struct Tap(String);

impl Tap {
    /// Makes one whose name begins so.
    ///
    /// # Panics
    ///
    /// When `ip` cannot make it.
    pub fn new(name: &str) -> Self {
        let name = format!("{name}{}", std::process::id());
        for words in [&["tuntap", "add", "dev", &name, "mode", "tap"][..], &["link", "set", &name, "up"]] {
            let made = Command::new("ip").args(words).status().expect("ip is installed");
            assert!(made.success(), "ip {words:?}");
        }
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

/// A packet of vsock that asks for a connection to a port on which nobody listens.
pub fn request_packet() -> Vec<u8> {
    let mut packet = vec![];
    packet.extend(3u64.to_le_bytes());
    packet.extend(2u64.to_le_bytes());
    packet.extend(4000u32.to_le_bytes());
    packet.extend(4001u32.to_le_bytes());
    packet.extend(0u32.to_le_bytes());
    packet.extend(1u16.to_le_bytes());
    packet.extend(1u16.to_le_bytes());
    packet.resize(44, 0);
    packet
}
