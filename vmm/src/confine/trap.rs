//! What happens on a system call that a thread's filter does not allow.

use std::io;
use std::sync::OnceLock;

use vmm_sys_util::signal::register_signal_handler;

/// Where `siginfo_t` has the number of the refused system call (`_sigsys` in `asm-generic/siginfo.h`).
const CALL_OFFSET: usize = 24;

/// Catches refused system calls in all threads.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(libc::SIGSYS, refused).map_err(|error| error.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// Says which call it was, and ends the process. Only what may be done in a signal handler is done here.
extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let mut line = Line::default();
    // SAFETY: the kernel hands a `siginfo_t` to the handler, which is longer than what is read of it.
    let call = unsafe { info.byte_add(CALL_OFFSET).cast::<i32>().read() };
    line.push(b"sandbox-vmm: the thread ");
    line.push_thread_name();
    line.push(b" made the system call ");
    line.push_number(call.unsigned_abs());
    line.push(b", which its work never needs: the guest may have taken it over\n");
    // SAFETY: the bytes are those of the line, and both calls may be made in a signal handler.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(1);
    }
}

/// A line of text without the heap. What does not fit is left out.
struct Line {
    bytes: [u8; 192],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 192], len: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn push_thread_name(&mut self) {
        let mut name = [0u8; 16];
        // SAFETY: the kernel writes at most 16 bytes, the last of them a zero.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        self.push(name.split(|byte| *byte == 0).next().unwrap_or_default());
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1;
        while number / divisor >= 10 {
            divisor *= 10;
        }
        while divisor > 0 {
            self.push(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_numbers_in_decimal_and_an_end() {
        for number in [0, 7, 10, 435, u32::MAX] {
            let mut line = Line::default();
            line.push_number(number);
            assert_eq!(line.bytes[..line.len], *number.to_string().as_bytes());
        }
        let mut line = Line::default();
        line.push(&[b'x'; 500]);
        assert_eq!(line.len, line.bytes.len());
    }
}
