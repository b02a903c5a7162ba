//! What there is in a network namespace, as the guest is to have it.

use std::io;
use std::net::IpAddr;

use sandbox_netlink::Netlink;
use sandbox_netlink::packet::AddressFamily;
use sandbox_netlink::packet::address::{AddressAttribute, AddressFlags, AddressMessage};
use sandbox_netlink::packet::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use sandbox_netlink::packet::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use sandbox_netlink::packet::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteType, RouteVia,
};
use sandbox_protocol::{Address, Interface, Mac, Neighbour, Network, Route};

use super::NetworkError;
use super::tap::is_named_as_ours;

/// A namespace, looked at.
#[derive(Debug)]
pub struct Scan {
    /// The interfaces that the guest is to have.
    pub interfaces: Vec<Found>,
    /// The owner of a tap of ours.
    tap: Option<String>,
    /// Interfaces that the guest cannot have, though they are in use.
    unsupported: Vec<String>,
    routes: Vec<RouteMessage>,
    neighbours: Vec<NeighbourMessage>,
}

/// An interface of the namespace.
#[derive(Debug)]
pub struct Found {
    /// Its index there.
    pub index: u32,
    /// What the guest is told of it.
    pub description: Interface,
}

impl Scan {
    /// Looks at a namespace.
    pub fn of(netlink: &mut Netlink) -> io::Result<Self> {
        let links: Vec<LinkMessage> = netlink.dump(libc::RTM_GETLINK, &LinkMessage::default())?;
        let addresses: Vec<AddressMessage> = netlink.dump(libc::RTM_GETADDR, &AddressMessage::default())?;
        let routes = netlink.dump(libc::RTM_GETROUTE, &RouteMessage::default())?;
        let neighbours = netlink.dump(libc::RTM_GETNEIGH, &NeighbourMessage::default())?;
        let mut scan =
            Self { interfaces: Vec::new(), tap: None, unsupported: Vec::new(), routes, neighbours };
        for link in &links {
            scan.take(link, &addresses);
        }
        Ok(scan)
    }

    fn take(&mut self, link: &LinkMessage, addresses: &[AddressMessage]) {
        let name = name(link);
        let index = link.header.index;
        if is_named_as_ours(&name) {
            let alias = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfAlias(alias) => Some(alias.clone()),
                _ => None,
            });
            self.tap.get_or_insert(alias.unwrap_or(name));
            return;
        }
        let part_of_another = link.attributes.iter().any(|a| matches!(a, LinkAttribute::Controller(_)));
        if link.header.flags.contains(LinkFlags::Loopback) || part_of_another {
            return;
        }
        let up = link.header.flags.contains(LinkFlags::Up);
        let addresses: Vec<_> =
            addresses.iter().filter(|a| a.header.index == index).filter_map(address).collect();
        // Some drivers put an interface into every namespace, which nobody has asked for.
        if !up && addresses.is_empty() {
            return;
        }
        match (link.header.link_layer_type, mac(link)) {
            (LinkLayerType::Ether, Some(mac)) => {
                let description = Interface { device: None, name, mac, mtu: mtu(link), up, addresses };
                self.interfaces.push(Found { index, description });
            }
            _ => self.unsupported.push(name),
        }
    }

    /// What a tap of ours says of its owner, if there is one.
    pub fn tap(&self) -> Option<&str> {
        self.tap.as_deref()
    }

    /// What the guest is told.
    pub fn describe(&self, namespace: &str) -> Result<Network, NetworkError> {
        let unsupported = |what| NetworkError::Unsupported { namespace: namespace.to_owned(), what };
        if let Some(name) = self.unsupported.first() {
            return Err(unsupported(format!("the interface {name}, which is not an Ethernet interface")));
        }
        let mut routes = Vec::new();
        for message in self.routes.iter().filter(|message| is_wanted(message)) {
            routes.extend(self.route(message).map_err(unsupported)?);
        }
        // A gateway has to be within reach before there is a route by way of it.
        routes.sort_by_key(|route| route.gateway.is_some());
        Ok(Network {
            interfaces: self.interfaces.iter().map(|found| found.description.clone()).collect(),
            neighbours: self.neighbours.iter().filter_map(|message| self.neighbour(message)).collect(),
            routes,
        })
    }

    /// The name of an interface that the guest has.
    fn given(&self, index: u32) -> Option<String> {
        self.interfaces.iter().find(|f| f.index == index).map(|found| found.description.name.clone())
    }

    /// A route, unless it leads over an interface that the guest does not have.
    fn route(&self, message: &RouteMessage) -> Result<Option<Route>, String> {
        let header = &message.header;
        let v4 = header.address_family == AddressFamily::Inet;
        let any: IpAddr = if v4 { [0; 4].into() } else { [0; 16].into() };
        let mut route = Route {
            interface: None,
            destination: any,
            prefix: header.destination_prefix_length,
            gateway: None,
            source: None,
            metric: None,
            mtu: None,
            scope: header.scope.into(),
            kind: header.kind.into(),
            protocol: header.protocol.into(),
            tos: header.tos,
            on_link: header.flags.contains(RouteFlags::Onlink),
        };
        let mut unsupported = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(to) => route.destination = ip(to).unwrap_or(any),
                RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway),
                RouteAttribute::Via(RouteVia::Inet(gateway)) => route.gateway = Some((*gateway).into()),
                RouteAttribute::Via(RouteVia::Inet6(gateway)) => route.gateway = Some((*gateway).into()),
                RouteAttribute::PrefSource(source) => route.source = ip(source),
                RouteAttribute::Priority(metric) => route.metric = Some(*metric),
                RouteAttribute::Metrics(metrics) => route.mtu = metrics.iter().find_map(mtu_of_route),
                RouteAttribute::Oif(index) => match self.given(*index) {
                    Some(name) => route.interface = Some(name),
                    // Some that lead nowhere lead there by way of the loopback interface.
                    None if header.kind == RouteType::Unicast => return Ok(None),
                    None => {}
                },
                RouteAttribute::MultiPath(_) => unsupported = Some("several ways"),
                RouteAttribute::Encap(_) => unsupported = Some("an encapsulation"),
                _ => {}
            }
        }
        match unsupported {
            Some(what) => Err(format!("a route to {}/{} with {what}", route.destination, route.prefix)),
            None => Ok(Some(route)),
        }
    }

    fn neighbour(&self, message: &NeighbourMessage) -> Option<Neighbour> {
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some((*address).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some((*address).into()),
            _ => None,
        })?;
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok().map(Mac),
            _ => None,
        })?;
        Some(Neighbour { interface: self.given(message.header.ifindex)?, address, mac })
    }
}

/// Routes of the main table that somebody has made: those of the kernel come with the addresses, and those that a
/// router announces reach the guest by themselves.
fn is_wanted(message: &RouteMessage) -> bool {
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let by_itself = [RouteProtocol::Kernel, RouteProtocol::Ra, RouteProtocol::IcmpRedirect]
        .contains(&message.header.protocol);
    let kinds = [
        RouteType::Unicast,
        RouteType::BlackHole,
        RouteType::Unreachable,
        RouteType::Prohibit,
        RouteType::Throw,
    ];
    table.unwrap_or(message.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
        && !by_itself
        && kinds.contains(&message.header.kind)
        && [AddressFamily::Inet, AddressFamily::Inet6].contains(&message.header.address_family)
}

/// An address, unless it is another's, or comes and goes with what a router announces.
fn address(message: &AddressMessage) -> Option<Address> {
    let (mut address, mut peer, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => peer = Some(*other),
            AddressAttribute::Broadcast(all) => broadcast = Some(*all),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = address.or(peer)?;
    let announced = address.is_ipv6() && !flags.contains(AddressFlags::Permanent);
    if announced || flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    Some(Address {
        address,
        prefix: message.header.prefix_len,
        peer: peer.filter(|peer| *peer != address),
        broadcast,
        scope: message.header.scope.into(),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
    })
}

fn name(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn mac(link: &LinkMessage) -> Option<Mac> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => mac.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

fn mtu(link: &LinkMessage) -> u32 {
    const ETHERNET: u32 = 1500;
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or(ETHERNET)
}

fn mtu_of_route(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
