//! Loop devices: block devices over files.
//!
//! The shim needs them for root file systems that are images, the agent for block devices of the host, which are files
//! to the guest. It is the kernel of whoever calls that has them (`loop(4)`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// The major number of loop devices.
pub const MAJOR: u32 = 7;

/// Where a free one is asked for.
const CONTROL: &str = "/dev/loop-control";

/// How often somebody else may be faster to take one that was free.
const ATTEMPTS: usize = 16;

/// `LOOP_*` and `LO_FLAGS_*` of `linux/loop.h`.
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// What a loop device is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Whether it cannot be written to.
    pub read_only: bool,
    /// Whether it goes with its last user.
    pub temporary: bool,
    /// Whether it leaves caching to its own users, where the file's system can do without.
    pub direct: bool,
    /// The bytes of its sectors; 0: the kernel's default.
    pub sector_bytes: u32,
}

/// A loop device that has just been attached.
#[derive(Debug)]
pub struct Attached {
    /// Its number.
    pub number: u32,
    /// The device: its first user.
    pub device: File,
}

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// The node of a loop device, by its number.
pub fn node_of(number: u32) -> PathBuf {
    Path::new("/dev").join(format!("loop{number}"))
}

/// Attaches a loop device to an open file.
pub fn attach(file: BorrowedFd<'_>, wanted: Wanted) -> io::Result<Attached> {
    let control = File::options().read(true).write(true).open(CONTROL)?;
    for _ in 0..ATTEMPTS {
        let number = free(&control)?;
        let device = File::options().read(true).write(!wanted.read_only).open(node_of(number))?;
        match configure(&device, file, wanted) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            configured => return configured.map(|()| Attached { number, device }),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Detaches a loop device: at once, or when its last user is gone.
pub fn detach(number: u32) -> io::Result<()> {
    let device = File::open(node_of(number))?;
    // SAFETY: the request takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn free(control: &File) -> io::Result<u32> {
    // SAFETY: the request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

fn configure(device: &File, file: BorrowedFd<'_>, wanted: Wanted) -> io::Result<()> {
    let flag = |is: bool, flag: u32| if is { flag } else { 0 };
    let config = LoopConfig {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: wanted.sector_bytes,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: flag(wanted.read_only, LO_FLAGS_READ_ONLY)
                | flag(wanted.temporary, LO_FLAGS_AUTOCLEAR)
                | flag(wanted.direct, LO_FLAGS_DIRECT_IO),
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads a structure of the layout that it has for this request, which lives until it returns.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_its_sizes() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }
}
