//! Programs and system calls that an ordinary userland does not have at hand.

use std::os::unix::fs::PermissionsExt;

use crate::{Outcome, number};

/// An ELF32 program for i386: `mov eax, 1; mov ebx, 42; int 0x80`, which is `exit(42)`.
const EXIT_42: [u8; 96] = {
    let mut elf = [0; 96];
    let header: [u8; 84] = [
        0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // 32-bit, little-endian
        2, 0, 3, 0, 1, 0, 0, 0, 0x54, 0x80, 0x04, 0x08, 52, 0, 0,
        0, // executable, i386, entry 0x8048054
        0, 0, 0, 0, 0, 0, 0, 0, 52, 0, 32, 0, 1, 0, 0, 0, 0, 0, 0, 0, // one program header
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x04, 0x08, 0, 0x80, 0x04, 0x08, // load at 0x8048000
        96, 0, 0, 0, 96, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0, // readable and executable
    ];
    let code = [0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80];
    let mut at = 0;
    while at < header.len() {
        elf[at] = header[at];
        at += 1;
    }
    while at < elf.len() {
        elf[at] = code[at - header.len()];
        at += 1;
    }
    elf
};

/// Runs a 32-bit program and checks its exit code.
pub fn run_32_bit(_: &[String]) -> Outcome {
    let path = "/tmp/exit42";
    std::fs::write(path, EXIT_42).map_err(|e| format!("{path}: {e}"))?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).map_err(|e| format!("{path}: {e}"))?;
    let status = std::process::Command::new(path).status().map_err(|e| format!("{path}: {e}"))?;
    if status.code() == Some(42) { Ok(()) } else { Err(format!("the 32-bit program ended with {status}")) }
}

/// Makes a system call with zeros for arguments and prints the error, 0 for none.
pub fn system_call(arguments: &[String]) -> Outcome {
    let number = i64::try_from(number(arguments, 0)?).map_err(|e| e.to_string())?;
    // SAFETY: with zeros for arguments, the calls that the tests name (getppid, keyctl and such) use no memory.
    let result = unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
    let error = std::io::Error::last_os_error().raw_os_error();
    println!("errno={}", if result < 0 { error.unwrap_or_default() } else { 0 });
    Ok(())
}
