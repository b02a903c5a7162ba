//! The machine's network devices that are no interfaces yet.
//!
//! A container sees the interfaces of its network namespace, and is to see none that nobody has set up. So devices
//! stand by in a namespace of their own, in which no process is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use sandbox_netlink::Netlink;
use sandbox_netlink::packet::link::{LinkAttribute, LinkMessage};
use sandbox_protocol::Mac;

/// Where the kernel lists the interfaces of the namespace that the agent is in.
pub const INTERFACES: &str = "/sys/class/net";

/// The namespace that this process is in.
const OWN: &str = "/proc/self/ns/net";

/// The process whose namespace is the sandbox's: the agent.
const AGENT: u32 = 1;

/// Devices that stand by.
pub struct Standby {
    /// Of their namespace, which lives as long as this.
    netlink: Netlink,
    /// Their indexes in it.
    devices: BTreeMap<Mac, u32>,
}

impl Standby {
    /// Has all devices stand by. `None`: the machine has none.
    pub fn of_all() -> io::Result<Option<Self>> {
        let devices = devices()?;
        if devices.is_empty() {
            return Ok(None);
        }
        let mut own = Netlink::open()?;
        let home = File::open(OWN)?;
        unshare(CloneFlags::CLONE_NEWNET)?;
        let made = File::open(OWN).and_then(|there| Ok((there, Netlink::open()?)));
        setns(home, CloneFlags::CLONE_NEWNET)?;
        let (there, netlink) = made?;
        for index in devices.values().copied() {
            // A name of its own, so that it is in nobody's way when it comes back.
            let name = LinkAttribute::IfName(format!("standby{index}"));
            own.change(libc::RTM_SETLINK, 0, &with(index, [name]))?;
            own.change(libc::RTM_SETLINK, 0, &with(index, [LinkAttribute::NetNsFd(there.as_raw_fd())]))?;
        }
        Ok(Some(Self { netlink, devices }))
    }

    /// Brings a device into the sandbox's namespace. Returns its index there; `None`: there is no such device.
    pub fn bring(&mut self, device: Mac) -> io::Result<Option<u32>> {
        let Some(index) = self.devices.remove(&device) else { return Ok(None) };
        self.netlink.change(libc::RTM_SETLINK, 0, &with(index, [LinkAttribute::NetNsPid(AGENT)]))?;
        Ok(devices()?.get(&device).copied())
    }
}

fn with(index: u32, attributes: impl Into<Vec<LinkAttribute>>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes.into();
    message
}

/// The interfaces here that belong to a device of the machine.
fn devices() -> io::Result<BTreeMap<Mac, u32>> {
    let mut devices = BTreeMap::new();
    for entry in std::fs::read_dir(INTERFACES)? {
        let directory = entry?.path();
        let address = std::fs::read_to_string(directory.join("address")).unwrap_or_default();
        if let (true, Some(mac)) = (directory.join("device").exists(), Mac::parse(address.trim())) {
            devices.insert(mac, index_in(&directory)?);
        }
    }
    Ok(devices)
}

/// The index of the interface with this directory in [`INTERFACES`].
pub fn index_in(directory: &Path) -> io::Result<u32> {
    let text = std::fs::read_to_string(directory.join("ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}
