//! Steers what is dialled at loopback addresses of a network namespace to one socket, whatever the port.
//!
//! A program of type `BPF_PROG_TYPE_SK_LOOKUP`, attached to the namespace, is asked which socket a new connection is for.
//! It holds for that namespace alone, and is gone with the descriptor of its link, however its owner ends.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `bpf(2)`: the commands and numbers used here.
const BPF_MAP_CREATE: i32 = 0;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_PROG_LOAD: i32 = 5;
const BPF_LINK_CREATE: i32 = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;

/// What the program calls.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// Where `struct bpf_sk_lookup` has what the program looks at. Addresses are in network order.
const FAMILY: i16 = 8;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// The answer that leaves everything else to the kernel.
const SK_PASS: i32 = 1;

/// An instruction of eBPF, laid out as the kernel's `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Registers: the answer, arguments, two that calls leave alone, and the stack.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R6_CONTEXT: u8 = 6;
const R7_SOCKET: u8 = 7;
const R10_STACK: u8 = 10;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// 32-bit load from memory.
const fn load_word(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x61, to, from, offset, 0)
}

const fn move_register(to: u8, from: u8) -> Instruction {
    instruction(0xbf, to, from, 0, 0)
}

const fn move_value(to: u8, value: i32) -> Instruction {
    instruction(0xb7, to, 0, 0, value)
}

const fn call(helper: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, helper)
}

/// Jumps go over so many instructions; 32 bits are compared.
const fn jump(skip: i16) -> Instruction {
    instruction(0x05, 0, 0, skip, 0)
}

const fn jump_if_value(register: u8, value: i32, skip: i16) -> Instruction {
    instruction(0x16, register, 0, skip, value)
}

const fn jump_unless_value(register: u8, value: i32, skip: i16) -> Instruction {
    instruction(0x56, register, 0, skip, value)
}

const EXIT: Instruction = instruction(0x95, 0, 0, 0, 0);

/// Four bytes of an address, as a word that is loaded from them.
const fn word(bytes: [u8; 4]) -> i32 {
    i32::from_ne_bytes(bytes)
}

/// The program: what goes to 127.0.0.0/8 or ::1 is for the socket in this map, whose protocol the kernel checks.
fn program(map: RawFd) -> Vec<Instruction> {
    let steer = [
        // The only key of the map, 0, on the stack.
        instruction(0x62, R10_STACK, 0, -4, 0),
        instruction(0x18, R1, BPF_PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        move_register(R2, R10_STACK),
        instruction(0x07, R2, 0, 0, -4),
        call(MAP_LOOKUP_ELEM),
        // No socket: to the end. 64 bits are compared, as it is a pointer.
        instruction(0x15, R0, 0, 7, 0),
        move_register(R7_SOCKET, R0),
        move_register(R1, R6_CONTEXT),
        move_register(R2, R7_SOCKET),
        move_value(R3, 0),
        call(SK_ASSIGN),
        move_register(R1, R7_SOCKET),
        call(SK_RELEASE),
        move_value(R0, SK_PASS),
        EXIT,
    ];
    // From so many instructions before those to the last two of them.
    let to_end = |before: i16| before + steer.len() as i16 - 2;
    let mut code = vec![
        move_register(R6_CONTEXT, R1),
        load_word(R2, R6_CONTEXT, FAMILY),
        jump_if_value(R2, libc::AF_INET6, 4),
        load_word(R2, R6_CONTEXT, LOCAL_IP4),
        instruction(0x54, R2, 0, 0, word([255, 0, 0, 0])),
        jump_if_value(R2, word([127, 0, 0, 0]), 9),
        jump(to_end(8)),
    ];
    for (at, expected) in [[0; 4], [0; 4], [0; 4], [0, 0, 0, 1]].into_iter().enumerate() {
        let at = at as i16;
        code.push(load_word(R2, R6_CONTEXT, LOCAL_IP6 + 4 * at));
        code.push(jump_unless_value(R2, word(expected), to_end(2 * (3 - at))));
    }
    code.extend(steer);
    code
}

#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

/// Steers connections to this socket from now on, in the network namespace, until the descriptor is closed.
pub fn steer(namespace: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = make_map()?;
    put(&map, to)?;
    attach(namespace, &load(&program(map.as_raw_fd()))?)
}

/// A map with room for one socket.
fn make_map() -> io::Result<OwnedFd> {
    let attributes =
        MapAttributes { map_type: BPF_MAP_TYPE_SOCKMAP, key_bytes: 4, value_bytes: 4, entries: 1 };
    // SAFETY: the attributes are plain numbers.
    unsafe { bpf_open(BPF_MAP_CREATE, &attributes) }
}

fn put(map: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0u32, socket.as_raw_fd());
    let attributes = UpdateAttributes {
        map: map.as_raw_fd(),
        padding: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: the attributes point at a key and a value of the map's sizes, which outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach_type: BPF_SK_LOOKUP,
        ..LoadAttributes::default()
    };
    // SAFETY: the attributes point at the program and the licence, which outlive the call.
    unsafe { bpf_open(BPF_PROG_LOAD, &attributes) }
}

fn attach(namespace: BorrowedFd<'_>, program: &OwnedFd) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes are plain numbers.
    unsafe { bpf_open(BPF_LINK_CREATE, &attributes) }
}

/// A command that answers with a new descriptor.
///
/// # Safety
///
/// As that of [`bpf`].
unsafe fn bpf_open<T>(command: i32, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
///
/// The attributes are those of the command, and what they point at is there until the call returns.
unsafe fn bpf<T>(command: i32, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the caller's; the kernel reads as many bytes of the attributes as there are.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    match RawFd::try_from(done) {
        Ok(done @ 0..) => Ok(done),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the program gets to the call that assigns a socket.
    fn steers(family: i32, ip4: [u8; 4], ip6: [u8; 16]) -> bool {
        let mut context = vec![0; LOCAL_IP6 as usize];
        context[FAMILY as usize..][..4].copy_from_slice(&family.to_ne_bytes());
        context[LOCAL_IP4 as usize..][..4].copy_from_slice(&ip4);
        context.extend(ip6);
        let program = program(7);
        let (mut r2, mut at) = (0, 0);
        loop {
            let i = program[at];
            at += 1;
            let skips = match i.code {
                0x61 => {
                    r2 = i32::from_ne_bytes(context[i.offset as usize..][..4].try_into().unwrap());
                    false
                }
                0x54 => {
                    r2 &= i.immediate;
                    false
                }
                0x16 => r2 == i.immediate,
                0x56 => r2 != i.immediate,
                0x05 => true,
                0x85 if i.immediate == SK_ASSIGN => return true,
                0x95 => return false,
                _ => false,
            };
            if skips {
                at += i.offset as usize;
            }
        }
    }

    #[test]
    fn only_what_goes_to_loopback_is_steered() {
        let ip6 = |address: &str| address.parse::<std::net::Ipv6Addr>().unwrap().octets();
        for (address, expected) in [
            ([127, 0, 0, 1], true),
            ([127, 9, 9, 9], true),
            ([10, 0, 0, 127], false),
            ([128, 0, 0, 1], false),
        ] {
            assert_eq!(steers(libc::AF_INET, address, ip6("::1")), expected, "{address:?}");
        }
        for (address, expected) in [("::1", true), ("::2", false), ("::", false), ("fd00::1", false)] {
            assert_eq!(steers(libc::AF_INET6, [127, 0, 0, 1], ip6(address)), expected, "{address}");
        }
    }
}
