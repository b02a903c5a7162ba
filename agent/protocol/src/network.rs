//! The network of a sandbox, as the guest is to have it.
//!
//! A guest has as many network devices as the machine was made with, named by the addresses that the machine
//! gave them. Each becomes an interface when the host says so, and stands by until then.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What to set up, in this order. What is there already stays.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Network {
    /// Interfaces.
    pub interfaces: Vec<Interface>,
    /// Addresses of others that need no looking up.
    pub neighbours: Vec<Neighbour>,
    /// Routes of the main table, those that others lead over first.
    pub routes: Vec<Route>,
}

/// An interface.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// The device that is to become it, by the address that the machine gave it; none: it has been set up before.
    #[serde(default)]
    pub device: Option<Mac>,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// The most bytes of a packet.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// A hardware address.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// An address of an interface.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// The length of its prefix.
    pub prefix: u8,
    /// The address at the other end, where there is only one.
    #[serde(default)]
    pub peer: Option<IpAddr>,
    /// The address of all.
    #[serde(default)]
    pub broadcast: Option<std::net::Ipv4Addr>,
    /// The kernel's number for how far it is known.
    pub scope: u8,
    /// Whether there is no route to its prefix by itself.
    #[serde(default)]
    pub no_prefix_route: bool,
}

/// A route.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Route {
    /// The interface's name; none: it leads nowhere, as its kind says.
    #[serde(default)]
    pub interface: Option<String>,
    /// Where to: for the default route, the address of all zeroes.
    pub destination: IpAddr,
    /// The length of the destination's prefix.
    pub prefix: u8,
    /// By way of.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// The address that packets are sent from.
    #[serde(default)]
    pub source: Option<IpAddr>,
    /// Its rank among routes to the same destination.
    #[serde(default)]
    pub metric: Option<u32>,
    /// The most bytes of a packet on its way.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// The kernel's number for how far the destination is.
    pub scope: u8,
    /// The kernel's number for what becomes of packets.
    pub kind: u8,
    /// The kernel's number for who made it.
    pub protocol: u8,
    /// The type of service that it is for; 0: any.
    #[serde(default)]
    pub tos: u8,
    /// Whether the gateway is taken to be on the link, whatever the addresses say.
    #[serde(default)]
    pub on_link: bool,
}

/// The hardware address of another.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// The interface's name.
    pub interface: String,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
}

impl Mac {
    /// Reads `aa:bb:cc:dd:ee:ff`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'))?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(mac))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is not a hardware address"))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_read_as_they_are_written() {
        let mac = Mac([0x02, 0, 0xab, 1, 2, 3]);
        assert_eq!(mac.to_string(), "02:00:ab:01:02:03");
        assert_eq!(Mac::parse("02:00:ab:01:02:03"), Some(mac));
        for bad in ["", "02:00:ab:01:02", "02:00:ab:01:02:03:04", "2:00:ab:01:02:03", "+2:00:ab:01:02:03"] {
            assert_eq!(Mac::parse(bad), None, "{bad}");
        }
    }
}
