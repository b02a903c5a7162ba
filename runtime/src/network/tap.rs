//! A tap: the network interface beside an engine's, whose wire ends in the virtual machine.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use sandbox_netlink::Netlink;
use sandbox_netlink::packet::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage};

/// What the names of taps begin with, by which they are known.
const NAME: &str = "sbxtap";

/// A tap in a network namespace. It goes when the last descriptor of it is closed.
#[derive(Debug)]
pub struct Tap {
    /// Its index in the namespace.
    pub index: u32,
}

impl Tap {
    /// Makes the tap with this number, down. To be called in its namespace; `owner` is what it says of itself.
    pub fn make(number: usize, owner: &str, netlink: &mut Netlink) -> io::Result<(Self, File)> {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        let name = format!("{NAME}{number}");
        attach(&file, &name)?;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let tap = Self { index: netdevice::name_to_index(socket, &name)? };
        netlink.change(libc::RTM_SETLINK, 0, &tap.attributes([LinkAttribute::IfAlias(owner.to_owned())]))?;
        // It has nothing to say of its own. A kernel without IPv6 gives it no address anyway.
        let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let _ = netlink.change(
            libc::RTM_SETLINK,
            0,
            &tap.attributes([LinkAttribute::AfSpecUnspec(vec![silent])]),
        );
        Ok((tap, file))
    }

    fn attributes(&self, attributes: impl Into<Vec<LinkAttribute>>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.attributes = attributes.into();
        message
    }
}

/// Whether an interface is a tap of ours.
pub fn is_named_as_ours(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|number| number.parse::<usize>().is_ok())
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: all zeroes are a value of this structure of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes one `ifreq`, which lives until it returns.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
