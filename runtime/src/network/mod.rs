//! The network of a sandbox: that of a network namespace of the host, which an engine has prepared.
//!
//! ```text
//!      namespace of the host                                 guest
//!  ┌─────────────────────────────────┐
//!  │ eth0 ── ingress ──► tap ────────┼──► virtio-net ──► eth0, the same name, address, MTU,
//!  │      ◄── ingress ── tap ◄───────┼───                IP addresses, routes, neighbours
//!  └─────────────────────────────────┘
//! ```
//!
//! Each interface of the namespace has a tap beside it, and a filter at the ingress of either sends all that
//! comes in out at the other ("tcfilter" in Kata Containers). The namespace's own stack sees nothing any more of
//! what comes in, the guest takes its place; counters, and whatever the engine has set up around the interface,
//! stay what they are.
//!
//! What is dialled at the loopback of a pod's namespace leads into the guest as well: see [`Loopback`].
//!
//! A machine has the network devices that it was made with, so there are some more taps than interfaces where the
//! namespace may still get others before the start: they stand by.

mod error;
mod loopback;
mod namespace;
mod redirect;
mod scan;
mod steering;
mod tap;
mod wanted;

pub use error::NetworkError;
pub use loopback::Loopback;
pub use wanted::Wanted;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use sandbox_netlink::Netlink;
use sandbox_protocol::Mac;
use sandbox_vmm_api::{FIRST_TAP_FD, NetConfig, TapSource};

use namespace::Namespace;
use scan::Scan;
use tap::Tap;

/// The most interfaces of a sandbox.
const MAX_INTERFACES: usize = 8;

/// The taps that stand by for interfaces that come before the start.
const SPARE_TAPS: usize = 2;

/// How long a machine may take to be gone after whoever led it was killed.
const END_TIME: Duration = Duration::from_secs(5);

/// How long the taps of a machine that seems to be gone may still be there.
const LAST_TAP_TIME: Duration = Duration::from_secs(2);

const POLL: Duration = Duration::from_millis(2);

/// The devices of a machine have addresses of their own (a local one, and the number of the tap), by which the
/// guest finds the one that becomes an interface.
const DEVICE: [u8; 5] = [0x02, b's', b'b', b'x', 0];

/// Whether the namespace may still get interfaces.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Growth {
    /// Until the start, which somebody else asks for.
    UntilStart,
    /// No more.
    Complete,
}

/// The network of a sandbox. Dropping it leaves the namespace as it was.
#[derive(Debug)]
pub struct Network {
    name: String,
    netlink: Netlink,
    taps: Vec<Tap>,
    /// The taps' descriptors, until the machine has them.
    descriptors: Vec<std::fs::File>,
    /// The interfaces that have a tap, and its place among them.
    attached: BTreeMap<u32, usize>,
    /// What the guest has been told last.
    told: Option<sandbox_protocol::Network>,
}

impl Network {
    /// Enters the namespace at a path and makes its taps there. `id` is what they are recognised by.
    pub fn prepare(path: &Path, id: &str, growth: Growth) -> Result<Self, NetworkError> {
        let namespace = Namespace::open(path)?;
        namespace.within(|| Self::make(path.display().to_string(), id, growth))?
    }

    /// To be called in the namespace.
    fn make(name: String, id: &str, growth: Growth) -> Result<Self, NetworkError> {
        let netlink = Netlink::open().map_err(|error| NetworkError::step(&name, "be configured", error))?;
        let mut network = Self {
            name,
            netlink,
            taps: Vec::new(),
            descriptors: Vec::new(),
            attached: BTreeMap::new(),
            told: None,
        };
        let scan = network.scan_when_free()?;
        let spare = if growth == Growth::UntilStart { SPARE_TAPS } else { 0 };
        for number in 0..network.check_count(scan.interfaces.len())?.saturating_add(spare).min(MAX_INTERFACES)
        {
            let (tap, file) = Tap::make(number, id, &mut network.netlink)
                .map_err(|error| NetworkError::step(&network.name, "get a tap device", error))?;
            network.taps.push(tap);
            network.descriptors.push(file);
        }
        network.attach_all(&scan)?;
        Ok(network)
    }

    /// What the machine is to have.
    pub fn devices(&self) -> Vec<NetConfig> {
        let device = |number| NetConfig {
            tap: TapSource::Descriptor(FIRST_TAP_FD + number),
            mac: device(number as usize).to_string(),
        };
        (0..self.taps.len() as i32).map(device).collect()
    }

    /// The descriptors that the machine inherits, from [`FIRST_TAP_FD`] on.
    pub fn descriptors(&self) -> impl Iterator<Item = (BorrowedFd<'_>, i32)> {
        self.descriptors.iter().map(AsFd::as_fd).zip(FIRST_TAP_FD..)
    }

    /// Lets go of the descriptors, now that the machine has them: the taps go when it does.
    pub fn handed_over(&mut self) {
        self.descriptors.clear();
    }

    /// Looks at the namespace, gives every new interface a tap, and returns what the guest has to be told, if
    /// there is anything that it does not know yet.
    pub fn update(&mut self) -> Result<Option<sandbox_protocol::Network>, NetworkError> {
        let scan = self.scan()?;
        self.attach_all(&scan)?;
        let known = self.told.take().unwrap_or_default();
        let names: Vec<&str> = known.interfaces.iter().map(|interface| interface.name.as_str()).collect();
        let mut network = scan.describe(&self.name)?;
        let all = network.clone();
        for (interface, found) in network.interfaces.iter_mut().zip(&scan.interfaces) {
            if !names.contains(&interface.name.as_str()) {
                interface.device = self.attached.get(&found.index).copied().map(device);
            }
        }
        self.told = Some(all);
        Ok((self.told.as_ref() != Some(&known) && !network.interfaces.is_empty()).then_some(network))
    }

    fn attach_all(&mut self, scan: &Scan) -> Result<(), NetworkError> {
        self.check_count(scan.interfaces.len())?;
        for interface in &scan.interfaces {
            if self.attached.contains_key(&interface.index) {
                continue;
            }
            let number = self.attached.len();
            let tap = self.taps.get(number).ok_or_else(|| NetworkError::TooMany {
                namespace: self.name.clone(),
                count: scan.interfaces.len(),
                most: self.taps.len(),
            })?;
            redirect::join(&mut self.netlink, interface, tap).map_err(|error| NetworkError::Redirect {
                namespace: self.name.clone(),
                interface: interface.description.name.clone(),
                error,
            })?;
            self.attached.insert(interface.index, number);
        }
        Ok(())
    }

    /// Looks at the namespace when no other machine's taps are in it. Those of one that was killed go with the last
    /// descriptor, which is a moment after its end can be seen.
    fn scan_when_free(&mut self) -> Result<Scan, NetworkError> {
        let deadline = Instant::now() + LAST_TAP_TIME;
        loop {
            let scan = self.scan()?;
            let Some(owner) = scan.tap() else { return Ok(scan) };
            if Instant::now() > deadline {
                return Err(NetworkError::InUse { namespace: self.name.clone(), owner: owner.to_owned() });
            }
            std::thread::sleep(POLL);
        }
    }

    fn scan(&mut self) -> Result<Scan, NetworkError> {
        Scan::of(&mut self.netlink).map_err(|error| NetworkError::step(&self.name, "be looked at", error))
    }

    fn check_count(&self, count: usize) -> Result<usize, NetworkError> {
        if count <= MAX_INTERFACES {
            return Ok(count);
        }
        Err(NetworkError::TooMany { namespace: self.name.clone(), count, most: MAX_INTERFACES })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for index in self.attached.keys() {
            // An interface that is gone has taken its filter along.
            let _ = redirect::part(&mut self.netlink, *index);
        }
    }
}

/// The address of the machine's device with this number.
fn device(number: usize) -> Mac {
    let [a, b, c, d, e] = DEVICE;
    Mac([a, b, c, d, e, number as u8])
}

/// Removes what a sandbox that was killed has left in a namespace: filters that lead to taps that are gone, as they
/// are when its machine is.
fn clean_up(path: &Path, id: &str) -> Result<(), NetworkError> {
    let Ok(namespace) = Namespace::open(path) else {
        // It is gone, and with it all that was in it.
        return Ok(());
    };
    let failed = |error| NetworkError::step(&path.display().to_string(), "be cleaned up", error);
    namespace
        .within(|| {
            let mut netlink = Netlink::open()?;
            let deadline = Instant::now() + END_TIME;
            let mut scan = Scan::of(&mut netlink)?;
            while scan.tap() == Some(id) && Instant::now() < deadline {
                std::thread::sleep(POLL);
                scan = Scan::of(&mut netlink)?;
            }
            scan.interfaces
                .iter()
                .try_for_each(|interface| redirect::part_from_dead(&mut netlink, interface.index))
        })?
        .map_err(failed)
}
