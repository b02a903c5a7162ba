//! Moving bytes between a unix socket and guest memory, without a copy in between.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::packet::Buffers;

/// The most pieces of memory in one call (`IOV_MAX`).
const PIECES_MAX: usize = 1024;

/// Reads what there is into guest memory. 0: the peer has closed its side.
pub fn read(stream: &UnixStream, buffers: &Buffers<'_>) -> io::Result<usize> {
    let guards: Vec<_> =
        buffers.slices().iter().take(PIECES_MAX).map(|slice| slice.ptr_guard_mut()).collect();
    let pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    retry(|| {
        // SAFETY: each piece lies in guest memory, which stays mapped while its guard lives; the guest may
        // change it meanwhile, which is the kernel's concern and not that of a reference of ours.
        unsafe { libc::readv(stream.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) }
    })
}

/// Writes guest memory. Fewer bytes than there are: the socket is full.
pub fn write(stream: &UnixStream, buffers: &Buffers<'_>) -> io::Result<usize> {
    let guards: Vec<_> = buffers.slices().iter().take(PIECES_MAX).map(|slice| slice.ptr_guard()).collect();
    let mut pieces: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    // SAFETY: as for reading; the kernel does not write through these pieces.
    unsafe { send(stream, pieces.as_mut_ptr(), pieces.len()) }
}

/// Writes memory of our own.
pub fn write_own(stream: &UnixStream, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: an `IoSlice` has the layout of an `iovec`, and the kernel does not write through these.
    unsafe { send(stream, pieces.as_ptr().cast_mut().cast(), pieces.len()) }
}

/// # Safety
///
/// The pieces must be readable for as long as the call takes.
unsafe fn send(stream: &UnixStream, pieces: *mut libc::iovec, count: usize) -> io::Result<usize> {
    // SAFETY: all zeroes is a message without address, data, and control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces;
    message.msg_iovlen = count;
    retry(|| {
        // SAFETY: the message names the pieces, readable by the caller's promise.
        unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    })
}

/// Whether the other end has closed its socket, not just shut down one side of it.
pub fn is_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = rustix::event::poll(&mut fds, Some(&now));
    polled.is_ok() && fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
