//! One network interface, without any tools.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// `ethtool_value` of `linux/ethtool.h`: a question, and room for the answer.
#[repr(C)]
struct Question {
    command: u32,
    answer: u32,
}

/// What is left to an interface, and the requests of `linux/ethtool.h` that ask for it.
const OFFLOADS: [(&str, u32); 3] = [("rx-checksum", 0x14), ("tx-checksum", 0x16), ("tcp-segmentation", 0x1e)];

/// Gives `eth0` an address in a /24 and takes it up.
pub fn configure(address: Ipv4Addr) -> Result<(), String> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| format!("socket: {e}"))?;
    request(&socket, libc::SIOCSIFADDR, Value::Address(address))?;
    request(&socket, libc::SIOCSIFNETMASK, Value::Address(Ipv4Addr::new(255, 255, 255, 0)))?;
    request(&socket, libc::SIOCSIFFLAGS, Value::Flags(libc::IFF_UP | libc::IFF_RUNNING))
}

/// Sends datagrams of different sizes to an echo service and expects each back.
pub fn echo(peer: &str) -> Result<(), String> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| format!("socket: {e}"))?;
    socket.set_read_timeout(Some(Duration::from_secs(1))).map_err(|e| e.to_string())?;
    for size in [1, 100, 1400, 9000] {
        let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        if !exchange(&socket, peer, &sent) {
            return Err(format!("a datagram of {size} bytes did not come back"));
        }
    }
    Ok(())
}

/// Connects to an echo service many times, one after the other, and expects a word back each time.
pub fn connections(arguments: &[String]) -> Result<(), String> {
    let peer = arguments.first().ok_or("an address is missing")?;
    for number in 0..crate::number(arguments, 1)? {
        let talk = || -> std::io::Result<bool> {
            let mut stream = TcpStream::connect(peer)?;
            let mut back = [0; 8];
            stream.write_all(&number.to_le_bytes())?;
            stream.read_exact(&mut back)?;
            Ok(back == number.to_le_bytes())
        };
        match talk() {
            Ok(true) => {}
            Ok(false) => return Err(format!("connection {number}: something else came back")),
            Err(error) => return Err(format!("connection {number}: {error}")),
        }
    }
    Ok(())
}

/// Echoes what comes over every connection to an address, to its end.
pub fn serve(arguments: &[String]) -> Result<(), String> {
    let address = arguments.first().ok_or("an address is missing")?;
    let listener = TcpListener::bind(address).map_err(|e| format!("{address}: {e}"))?;
    for stream in listener.incoming() {
        let mut stream = stream.map_err(|e| format!("{address}: {e}"))?;
        std::thread::spawn(move || {
            let mut from = stream.try_clone()?;
            std::io::copy(&mut from, &mut stream)
        });
    }
    Ok(())
}

/// Prints what `eth0` does for the network stack.
pub fn offloads(_: &[String]) -> Result<(), String> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| format!("socket: {e}"))?;
    for (name, command) in OFFLOADS {
        let mut question = Question { command, answer: 0 };
        request(&socket, libc::SIOCETHTOOL, Value::Question(&mut question))?;
        println!("{name} {}", if question.answer == 0 { "off" } else { "on" });
    }
    Ok(())
}

/// Datagrams may be lost, the first ones to address resolution: a few tries.
fn exchange(socket: &UdpSocket, peer: &str, sent: &[u8]) -> bool {
    let mut back = vec![0; sent.len() + 1];
    (0..20).any(|_| {
        let _ = socket.send_to(sent, peer);
        matches!(socket.recv_from(&mut back), Ok((n, _)) if back[..n] == *sent)
    })
}

enum Value<'a> {
    Address(Ipv4Addr),
    Flags(i32),
    Question(&'a mut Question),
}

fn request(socket: &UdpSocket, number: libc::Ioctl, value: Value<'_>) -> Result<(), String> {
    // SAFETY: an ifreq of zeros is a valid one.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(b"eth0") {
        *to = from.cast_signed();
    }
    match value {
        Value::Address(address) => {
            let mut data = [0; 14];
            for (to, from) in data[2..].iter_mut().zip(address.octets()) {
                *to = from.cast_signed();
            }
            let family = libc::AF_INET.cast_unsigned() as u16;
            ifreq.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: family, sa_data: data };
        }
        Value::Flags(flags) => ifreq.ifr_ifru.ifru_flags = flags as i16,
        Value::Question(question) => ifreq.ifr_ifru.ifru_data = std::ptr::from_mut(question).cast(),
    }
    // SAFETY: the request takes an ifreq, which outlives the call, as does what it points to.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), number, &ifreq) };
    if result < 0 {
        Err(format!("eth0, request {number:#x}: {}", std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}
