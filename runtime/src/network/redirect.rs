//! Sends what comes in at one interface out at another, both ways, by traffic control.

use std::io;

use sandbox_netlink::packet::link::{LinkAttribute, LinkFlags, LinkMessage};
use sandbox_netlink::packet::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use sandbox_netlink::{NLM_F_CREATE, NLM_F_EXCL, Netlink};

use super::scan::Found;
use super::tap::Tap;

/// The place of our filters among others at the same ingress: behind all that were given no place.
const PRIORITY: u16 = u16::MAX;

/// All protocols (`ETH_P_ALL`), in network byte order.
const ALL_PROTOCOLS: u16 = 0x0003u16.to_be();

/// Joins an interface with a tap, which is down until then.
pub fn join(netlink: &mut Netlink, interface: &Found, tap: &Tap) -> io::Result<()> {
    netlink.change(libc::RTM_SETLINK, 0, &up(tap.index, interface.description.mtu))?;
    let joined = redirect(netlink, interface.index, tap.index)
        .and_then(|()| redirect(netlink, tap.index, interface.index));
    joined.inspect_err(|_| {
        let _ = part(netlink, interface.index);
    })
}

/// Takes the redirection of an interface back.
pub fn part(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let mut filter = filter(index);
    filter.attributes = vec![TcAttribute::Kind(TcFilterU32::KIND.into())];
    let removed = netlink.change(libc::RTM_DELTFILTER, 0, &filter);
    if !filters(netlink, index)?.is_empty() {
        return removed;
    }
    netlink.change(libc::RTM_DELQDISC, 0, &ingress(index))
}

/// The same, if it leads to an interface that is gone.
pub fn part_from_dead(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let dead = |filter: &TcMessage| {
        filter.header.info >> 16 == u32::from(PRIORITY) && target(filter).is_some_and(|target| target == 0)
    };
    match filters(netlink, index)?.iter().any(dead) {
        true => part(netlink, index),
        false => Ok(()),
    }
}

fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    // One that a sandbox has left which was killed leads nowhere.
    part_from_dead(netlink, from)?;
    match netlink.change(libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &ingress(from)) {
        // Somebody looks at what comes in there before us.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        done => done?,
    }
    let mut filter = filter(from);
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(everything())),
            TcOption::U32(TcFilterU32Option::Action(vec![out_at(to)])),
        ]),
    ];
    netlink.change(libc::RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &filter)
}

/// What matches every packet: one word of it, of which no bit counts.
fn everything() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    selector
}

/// The action that sends a packet out at an interface.
fn out_at(index: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = index;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}

/// Where a filter sends packets; 0 for an interface that is gone.
fn target(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let parts = actions.flatten().flat_map(|action| &action.attributes).filter_map(|part| match part {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    parts.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
        _ => None,
    })
}

/// The filters at an interface's ingress.
fn filters(netlink: &mut Netlink, index: u32) -> io::Result<Vec<TcMessage>> {
    let mut all = filter(index);
    all.header.info = 0;
    netlink.dump(libc::RTM_GETTFILTER, &all)
}

/// The queue through which all comes that comes in.
fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.header.parent = TcHandle::INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".into())];
    message
}

/// Our filter there, without what it does.
fn filter(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
    message.header.info = u32::from(PRIORITY) << 16 | u32::from(ALL_PROTOCOLS);
    message
}

fn up(index: u32, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::Mtu(mtu)];
    message
}
