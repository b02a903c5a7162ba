//! A compiled system call filter: classic BPF, as the kernel takes it.
//!
//! libseccomp compiles the rules, and a few instructions are put in front: where the rules deny by default,
//! system calls newer than all that the rules name fail with `ENOSYS` instead of the denial. C libraries try new
//! calls and fall back to older ones, but only when they are told that a call does not exist. runc does the same.

use std::io::{self, Read, Seek};
use std::os::fd::AsFd;

use libseccomp::ScmpFilterContext;
use rustix::fs::{MemfdFlags, memfd_create};

/// The bytes of an instruction, the kernel's `struct sock_filter`.
const INSTRUCTION_BYTES: usize = 8;

/// The most instructions that the kernel takes.
const MAX_INSTRUCTIONS: usize = 4096;

/// Where the kernel's `struct seccomp_data` has the number of the call, and the architecture.
const CALL_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// From here on, numbers are of the x32 kind, and left to libseccomp's part.
const X32_BIT: u32 = 0x4000_0000;

/// A compiled filter.
#[derive(Debug)]
pub struct Program {
    instructions: Vec<libc::sock_filter>,
    flags: u64,
}

impl Program {
    /// Takes what libseccomp has compiled; `flags` are those of `seccomp(2)`.
    ///
    /// # Errors
    ///
    /// There is no memory for it, or it is longer than the kernel takes.
    pub fn new(filter: &ScmpFilterContext, flags: u64) -> io::Result<Self> {
        let file = memfd_create("filter", MemfdFlags::CLOEXEC)?;
        filter.export_bpf(file.as_fd()).map_err(io::Error::other)?;
        let (mut file, mut bytes) = (std::fs::File::from(file), Vec::new());
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        let instructions = bytes.as_chunks::<INSTRUCTION_BYTES>().0.iter().map(instruction).collect();
        Self { instructions, flags }.checked()
    }

    /// Has calls with greater numbers than `newest` fail with `ENOSYS`.
    pub fn with_newer_missing(mut self, newest: u32) -> io::Result<Self> {
        let mut front = Vec::from(newer_missing(newest));
        front.append(&mut self.instructions);
        self.instructions = front;
        self.checked()
    }

    fn checked(self) -> io::Result<Self> {
        match self.instructions.len() {
            0..=MAX_INSTRUCTIONS => Ok(self),
            n => Err(io::Error::other(format!(
                "it has {n} instructions, and the kernel takes {MAX_INSTRUCTIONS}"
            ))),
        }
    }

    /// Puts this process and all that come from it under the filter.
    pub fn load(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: self.instructions.len() as u16,
            filter: self.instructions.as_ptr().cast_mut(),
        };
        // SAFETY: the program and its instructions outlive the call, which only reads them.
        let loaded =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &program) };
        if loaded == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn instruction(bytes: &[u8; INSTRUCTION_BYTES]) -> libc::sock_filter {
    let [code0, code1, jt, jf, k @ ..] = *bytes;
    libc::sock_filter { code: u16::from_ne_bytes([code0, code1]), jt, jf, k: u32::from_ne_bytes(k) }
}

/// Only calls of the native kind are looked at: those of others go on to libseccomp's part.
fn newer_missing(newest: u32) -> [libc::sock_filter; 6] {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const JUMP_GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
    const JUMP_NOT_LESS: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const MISSING: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    let op = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    [
        op(LOAD, ARCH_OFFSET, 0, 0),
        op(JUMP_EQUAL, AUDIT_ARCH_X86_64, 0, 4),
        op(LOAD, CALL_OFFSET, 0, 0),
        op(JUMP_NOT_LESS, X32_BIT, 2, 0),
        op(JUMP_GREATER, newest, 0, 1),
        op(RETURN, MISSING, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the front sends a call: to `ENOSYS`, or on.
    fn is_missing(newest: u32, arch: u32, call: u32) -> bool {
        let front = newer_missing(newest);
        let (mut at, mut value) = (0, 0);
        while at < front.len() {
            let i = front[at];
            at += 1;
            let jump = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                0x20 if i.k == ARCH_OFFSET => value = arch,
                0x20 => value = call,
                0x15 => at += jump(value == i.k),
                0x25 => at += jump(value > i.k),
                0x35 => at += jump(value >= i.k),
                0x06 => return true,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
        assert_eq!(at, front.len(), "a jump into libseccomp's part");
        false
    }

    #[test]
    fn only_newer_native_calls_are_missing() {
        assert!(is_missing(450, AUDIT_ARCH_X86_64, 451));
        assert!(!is_missing(450, AUDIT_ARCH_X86_64, 450));
        assert!(!is_missing(450, AUDIT_ARCH_X86_64, 0));
        assert!(!is_missing(450, AUDIT_ARCH_X86_64, X32_BIT | 500));
        assert!(!is_missing(450, 0x4000_0003, 451));
    }
}
