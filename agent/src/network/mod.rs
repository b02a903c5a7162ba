//! The sandbox's network: the machine's network devices become the interfaces that the host describes.
//!
//! They live in the guest's first network namespace, which is the sandbox's own. What the host says is carried out
//! as it is; a device that it says nothing of stands by.

mod messages;
mod standby;

pub use standby::Standby;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use sandbox_netlink::{NLM_F_CREATE, NLM_F_REPLACE, Netlink};
use sandbox_protocol::{Interface, Mac, Neighbour, Network, Route};
use standby::{INTERFACES, index_in};

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel's network configuration is out of reach.
    #[error("cannot reach the network configuration of the guest's kernel: {0}")]
    Netlink(#[source] io::Error),
    /// The machine has no such device.
    #[error("the machine has no network device with the address {device} to become {name}")]
    NoDevice {
        /// The address of the device.
        device: Mac,
        /// The interface that it was to become.
        name: String,
    },
    /// There is no such interface.
    #[error("there is no network interface {name}: {error}")]
    NoInterface {
        /// Its name.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// A step was refused.
    #[error("cannot {step}: {error}")]
    Refused {
        /// What was being done.
        step: String,
        /// Why.
        error: io::Error,
    },
}

/// Sets the network up, with devices that stand by. What has been set up before stays.
pub fn set_up(wanted: &Network, standby: Option<&mut Standby>) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open().map_err(NetworkError::Netlink)?;
    let mut indexes = BTreeMap::new();
    let mut standby = standby;
    for interface in &wanted.interfaces {
        let index = set_up_interface(&mut netlink, standby.as_deref_mut(), interface)?;
        indexes.insert(interface.name.as_str(), index);
    }
    let index = |name: &str| match indexes.get(name) {
        Some(index) => Ok(*index),
        None => index_of(name),
    };
    for neighbour in &wanted.neighbours {
        add_neighbour(&mut netlink, index(&neighbour.interface)?, neighbour)?;
    }
    for route in &wanted.routes {
        let index = route.interface.as_deref().map(index).transpose()?;
        add_route(&mut netlink, index, route)?;
    }
    Ok(())
}

/// Makes an interface of its device, if that has not been done before, and gives it its addresses. Returns its
/// index.
fn set_up_interface(
    netlink: &mut Netlink,
    standby: Option<&mut Standby>,
    interface: &Interface,
) -> Result<u32, NetworkError> {
    let name = &interface.name;
    let index = match interface.device {
        Some(device) => {
            let brought = standby.map(|standby| standby.bring(device)).transpose();
            let index = brought
                .map_err(|error| refused(format!("take the device {device} for {name}"), error))?
                .flatten()
                .ok_or_else(|| NetworkError::NoDevice { device, name: name.clone() })?;
            netlink
                .change(libc::RTM_SETLINK, 0, &messages::identity(index, interface))
                .map_err(|error| refused(format!("set name, address and MTU of {name}"), error))?;
            keep_addresses_as_told(name)?;
            index
        }
        None => index_of(name)?,
    };
    if interface.up {
        netlink
            .change(libc::RTM_SETLINK, 0, &messages::up(index))
            .map_err(|error| refused(format!("bring {name} up"), error))?;
    }
    for address in &interface.addresses {
        netlink
            .change(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &messages::address(index, name, address))
            .map_err(|error| {
                refused(format!("give {name} the address {}/{}", address.address, address.prefix), error)
            })?;
    }
    Ok(index)
}

/// The kernel makes no link-local address of its own: the host says which there is.
fn keep_addresses_as_told(name: &str) -> Result<(), NetworkError> {
    const NONE: &str = "1";
    let setting = Path::new("/proc/sys/net/ipv6/conf").join(name).join("addr_gen_mode");
    match std::fs::write(&setting, NONE) {
        // A kernel without IPv6 makes none either.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(refused(format!("write {}", setting.display()), error))
        }
        _ => Ok(()),
    }
}

fn add_neighbour(netlink: &mut Netlink, index: u32, neighbour: &Neighbour) -> Result<(), NetworkError> {
    netlink
        .change(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &messages::neighbour(index, neighbour))
        .map_err(|error| {
            let step = format!("make {} a neighbour on {}", neighbour.address, neighbour.interface);
            refused(step, error)
        })
}

fn add_route(netlink: &mut Netlink, index: Option<u32>, route: &Route) -> Result<(), NetworkError> {
    netlink
        .change(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &messages::route(index, route))
        .map_err(|error| refused(format!("add the route to {}/{}", route.destination, route.prefix), error))
}

fn refused(step: String, error: io::Error) -> NetworkError {
    NetworkError::Refused { step, error }
}

fn index_of(name: &str) -> Result<u32, NetworkError> {
    index_in(&Path::new(INTERFACES).join(name))
        .map_err(|error| NetworkError::NoInterface { name: name.to_owned(), error })
}
