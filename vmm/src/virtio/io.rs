//! The buffers of a chain, and moving bytes between them and a file without a copy in between.
//!
//! Buffers are consumed from the front: a device takes its header, then moves the rest. What a guest can do
//! at most is to change the bytes under the device's hands; so a header is copied out first, and only the copy
//! is believed.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{Bytes, VolatileSlice};

/// The most buffers that one system call takes (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// A buffer in guest memory.
pub type Slice<'m> = VolatileSlice<'m, BitmapMmapRegion>;

/// Buffers in guest memory, one after the other as the guest gave them.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: VecDeque<Slice<'m>>,
    bytes: usize,
}

/// The buffers hold fewer bytes than the device needs of them.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{wanted} bytes wanted of buffers that hold {left}")]
pub struct TooShort {
    /// What was asked for.
    pub wanted: usize,
    /// What there was.
    pub left: usize,
}

impl<'m> Buffers<'m> {
    /// Adds a buffer at the end; an empty one changes nothing but is legal.
    pub fn push(&mut self, slice: Slice<'m>) {
        if !slice.is_empty() {
            self.bytes += slice.len();
            self.slices.push_back(slice);
        }
    }

    /// The bytes that are left.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The buffers that are left, one by one.
    pub fn slices(&self) -> impl Iterator<Item = &Slice<'m>> {
        self.slices.iter()
    }

    /// Copies the next bytes out.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), TooShort> {
        self.check(data.len())?;
        let mut done = 0;
        while let (Some(slice), Some(rest)) = (self.slices.front(), data.get_mut(done..)) {
            if rest.is_empty() {
                break;
            }
            let count = slice.copy_to(rest);
            self.consume(count);
            done += count;
        }
        Ok(())
    }

    /// Copies bytes in at the front.
    pub fn write(&mut self, data: &[u8]) -> Result<(), TooShort> {
        self.check(data.len())?;
        let mut done = 0;
        while let (Some(slice), Some(rest)) = (self.slices.front(), data.get(done..)) {
            if rest.is_empty() {
                break;
            }
            let count = slice.write(rest, 0).unwrap_or(0);
            self.consume(count);
            done += count;
        }
        Ok(())
    }

    /// Splits the last bytes off, such as a status byte that follows the data.
    pub fn split_last(&mut self, count: usize) -> Result<Buffers<'m>, TooShort> {
        self.check(count)?;
        self.split_first(self.bytes - count).map(|first| std::mem::replace(self, first))
    }

    /// Splits the first bytes off.
    pub fn split_first(&mut self, count: usize) -> Result<Buffers<'m>, TooShort> {
        self.check(count)?;
        let mut first = Buffers::default();
        while first.bytes < count {
            let Some(slice) = self.slices.pop_front() else { break };
            self.bytes -= slice.len();
            let part = slice.len().min(count - first.bytes);
            match slice.split_at(part) {
                Ok((head, tail)) => {
                    first.push(head);
                    if !tail.is_empty() {
                        self.bytes += tail.len();
                        self.slices.push_front(tail);
                    }
                }
                Err(_) => first.push(slice),
            }
        }
        Ok(first)
    }

    /// Reads from a stream into the buffers, as much as one call gives, and consumes what was filled.
    pub fn read_from(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: `system_call` passes vectors that describe live guest memory, which the kernel may write.
        self.system_call(|iovecs| unsafe {
            libc::readv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
        })
        .inspect(|&count| self.written(count))
    }

    /// Reads from a stream into the buffers and, what does not fit them, into `rest`, in one call; consumes
    /// what was filled. Of more than 1,023 buffers, those after them are left out.
    pub fn read_from_and(&mut self, file: BorrowedFd<'_>, rest: &mut [u8]) -> io::Result<usize> {
        let rest = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        // SAFETY: as in `read_from`; the last vector describes `rest`, which is borrowed for writing.
        self.system_call_and(Some(rest), |iovecs| unsafe {
            libc::readv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
        })
        .inspect(|&count| self.written(count))
    }

    /// Reads from a place in a file.
    pub fn read_from_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: as in `read_from`.
        self.system_call(|iovecs| unsafe {
            libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset)
        })
        .inspect(|&count| self.written(count))
    }

    /// Writes the buffers to a stream, as much as one call takes, and consumes what was taken.
    pub fn write_to(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: `system_call` passes vectors that describe live guest memory, which the kernel may read.
        self.system_call(|iovecs| unsafe {
            libc::writev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
        })
        .inspect(|&count| self.consume(count))
    }

    /// Writes the buffers to a place in a file.
    pub fn write_to_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: as in `write_to`.
        self.system_call(|iovecs| unsafe {
            libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset)
        })
        .inspect(|&count| self.consume(count))
    }

    /// Marks the front as written by the device and consumes it.
    fn written(&mut self, count: usize) {
        let mut left = count;
        for slice in &self.slices {
            let part = slice.len().min(left);
            slice.bitmap().mark_dirty(0, part);
            left -= part;
        }
        self.consume(count);
    }

    /// Drops bytes from the front, at most those there are.
    pub fn consume(&mut self, count: usize) {
        let mut left = count.min(self.bytes);
        self.bytes -= left;
        while left > 0 {
            let Some(slice) = self.slices.pop_front() else { return };
            if slice.len() > left {
                if let Ok(rest) = slice.offset(left) {
                    self.slices.push_front(rest);
                }
                return;
            }
            left -= slice.len();
        }
    }

    fn check(&self, wanted: usize) -> Result<(), TooShort> {
        if wanted > self.bytes { Err(TooShort { wanted, left: self.bytes }) } else { Ok(()) }
    }

    fn system_call(&self, call: impl Fn(&[libc::iovec]) -> isize) -> io::Result<usize> {
        self.system_call_and(None, call)
    }

    fn system_call_and(
        &self,
        last: Option<libc::iovec>,
        call: impl Fn(&[libc::iovec]) -> isize,
    ) -> io::Result<usize> {
        let own = MAX_IOVECS - usize::from(last.is_some());
        let guards: Vec<_> = self.slices.iter().take(own).map(|slice| slice.ptr_guard_mut()).collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .chain(last)
            .collect();
        loop {
            match usize::try_from(call(&iovecs)) {
                Ok(count) => return Ok(count),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{GuestAddress, GuestMemory as _};

    use super::*;
    use crate::virtio::GuestMemory;

    #[test]
    fn what_a_write_took_is_not_written_again() {
        const BYTES: usize = 1 << 20;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), BYTES)]).unwrap();
        let text: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
        memory.write_slice(&text, GuestAddress(0)).unwrap();
        let mut buffers = Buffers::default();
        for at in (0..BYTES).step_by(BYTES / 16) {
            buffers.push(memory.get_slice(GuestAddress(at as u64), BYTES / 16).unwrap());
        }

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (mut come, mut calls) = (vec![], 0);
        while !buffers.is_empty() {
            let left = buffers.len();
            let taken = buffers.write_to(ours.as_fd()).unwrap();
            assert_eq!(buffers.len(), left - taken);
            calls += 1;
            // Reads what there is, which makes room.
            assert_eq!(theirs.read_to_end(&mut come).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        assert!(calls > 1, "the socket has taken all of it at once");
        assert!(come == text, "{} bytes have come of {BYTES}", come.len());
    }
}
