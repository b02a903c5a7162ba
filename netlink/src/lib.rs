//! Requests to the kernel's network configuration (rtnetlink), one at a time.
//!
//! A request is one message of a type `RTM_*`. A change is answered by an acknowledgement that carries an error
//! or none; a dump by any number of messages and an end. What the messages are made of is in
//! [`netlink_packet_route`]; its one large enumeration of them is left alone, since it would bring code for all of
//! them into programs that make two or three.

#![forbid(unsafe_code)]

use std::io;

pub use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader, Parseable,
};
pub use netlink_packet_route as packet;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// The bytes of a message's header.
const HEADER_BYTES: usize = 16;

/// How often a dump is begun anew that a change of others has made inconsistent.
const DUMP_ATTEMPTS: usize = 10;

/// The network configuration of the namespace that the opening thread was in, whoever asks later.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// A message of an answer.
struct Message {
    header: NetlinkHeader,
    body: Vec<u8>,
}

impl Netlink {
    /// Opens the configuration of this thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Without the request in it, an acknowledgement has a size that is known.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Changes something: `kind` is a type of message, `flags` are `NLM_F_*` besides those of every request.
    pub fn change(&mut self, kind: u16, flags: u16, body: &impl Emitable) -> io::Result<()> {
        self.send(kind, flags | NLM_F_ACK, body)?;
        loop {
            for message in self.receive()? {
                if message.header.message_type == NLMSG_ERROR {
                    return acknowledged(&message.body);
                }
            }
        }
    }

    /// Lists all that there is of something: `kind` is the type of the request, `M` what answers it.
    pub fn dump<M: Parseable<[u8]>>(&mut self, kind: u16, body: &impl Emitable) -> io::Result<Vec<M>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(list) = self.dump_once(kind, body)? {
                return Ok(list);
            }
        }
        Err(io::Error::other("it keeps changing while it is read"))
    }

    /// `None`: it has changed meanwhile.
    fn dump_once<M: Parseable<[u8]>>(
        &mut self,
        kind: u16,
        body: &impl Emitable,
    ) -> io::Result<Option<Vec<M>>> {
        self.send(kind, NLM_F_DUMP, body)?;
        let (mut list, mut consistent) = (Vec::new(), true);
        loop {
            for message in self.receive()? {
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.header.message_type {
                    NLMSG_DONE => return Ok(consistent.then_some(list)),
                    NLMSG_ERROR => acknowledged(&message.body)?,
                    _ => list.push(M::parse(&message.body).map_err(io::Error::other)?),
                }
            }
        }
    }

    fn send(&mut self, kind: u16, flags: u16, body: &impl Emitable) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = vec![0; HEADER_BYTES + body.buffer_len()];
        let mut header = NetlinkHeader::default();
        header.length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        header.message_type = kind;
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let (head, rest) = bytes.split_at_mut(HEADER_BYTES);
        header.emit(head);
        body.emit(rest);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// The next answers to the last request.
    fn receive(&self) -> io::Result<Vec<Message>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let buffer = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let header = NetlinkHeader::parse(&buffer).map_err(io::Error::other)?;
            if header.sequence_number == self.sequence {
                messages.push(Message { header, body: buffer.payload().to_vec() });
            }
            let length = header.length as usize;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(messages)
    }
}

/// What an acknowledgement says: an error, or none.
fn acknowledged(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().copied().map(i32::from_ne_bytes).ok_or(io::ErrorKind::InvalidData)?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.saturating_neg())) }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn interfaces_are_listed() {
        let mut netlink = Netlink::open().unwrap();
        let links: Vec<LinkMessage> = netlink.dump(libc::RTM_GETLINK, &LinkMessage::default()).unwrap();
        let loopback = LinkAttribute::IfName("lo".into());
        assert!(links.iter().any(|link| link.attributes.contains(&loopback)));
    }

    #[test]
    fn a_refusal_has_the_kernels_reason() {
        let mut netlink = Netlink::open().unwrap();
        let mut link = LinkMessage::default();
        link.header.index = i32::MAX as u32;
        let error = netlink.change(libc::RTM_SETLINK, 0, &link).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)), "{error}");
    }
}
