//! What is said to the kernel.

use std::net::IpAddr;

use sandbox_netlink::packet::AddressFamily;
use sandbox_netlink::packet::address::{AddressAttribute, AddressFlags, AddressMessage};
use sandbox_netlink::packet::link::{LinkAttribute, LinkFlags, LinkMessage};
use sandbox_netlink::packet::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use sandbox_netlink::packet::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteVia,
};
use sandbox_protocol::{Address, Interface, Neighbour, Route};

/// Gives a device the name, the address and the MTU of its interface.
pub fn identity(index: u32, interface: &Interface) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![
        LinkAttribute::IfName(interface.name.clone()),
        LinkAttribute::Address(interface.mac.0.to_vec()),
        LinkAttribute::Mtu(interface.mtu),
    ];
    message
}

/// Brings an interface up.
pub fn up(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

/// Gives an interface an address. Whether it is unique has been found out on the host.
pub fn address(index: u32, interface: &str, address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.address);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = index;
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    flags.set(AddressFlags::Nodad, address.address.is_ipv6());
    message.attributes = vec![
        AddressAttribute::Local(address.address),
        AddressAttribute::Address(address.peer.unwrap_or(address.address)),
        AddressAttribute::Flags(flags),
    ];
    if address.address.is_ipv4() {
        message.attributes.push(AddressAttribute::Label(interface.to_owned()));
    }
    message.attributes.extend(address.broadcast.map(AddressAttribute::Broadcast));
    message
}

/// Makes another known for good.
pub fn neighbour(index: u32, neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.address.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()),
    ];
    message
}

/// Adds a route of the main table.
pub fn route(index: Option<u32>, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination);
    message.header.destination_prefix_length = route.prefix;
    message.header.tos = route.tos;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = route.protocol.into();
    message.header.scope = route.scope.into();
    message.header.kind = route.kind.into();
    message.header.flags.set(RouteFlags::Onlink, route.on_link);
    let mut attributes = vec![RouteAttribute::Destination(route_address(route.destination))];
    attributes.extend(route.gateway.map(|gateway| gateway_of(route.destination, gateway)));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(route_address(source))));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    attributes.extend(index.map(RouteAttribute::Oif));
    message.attributes = attributes;
    message
}

/// A gateway of the other family is written in a way of its own.
fn gateway_of(destination: IpAddr, gateway: IpAddr) -> RouteAttribute {
    match gateway {
        _ if gateway.is_ipv4() == destination.is_ipv4() => RouteAttribute::Gateway(route_address(gateway)),
        IpAddr::V4(gateway) => RouteAttribute::Via(RouteVia::Inet(gateway)),
        IpAddr::V6(gateway) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
