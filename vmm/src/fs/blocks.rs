//! Block devices of the host, which the guest sees as files at the top of its share.
//!
//! The file server opens no device node, whoever made it. What the guest is to have of a device is a descriptor that
//! the runtime has opened; here it gets a name that no entry of the share has ([`sandbox_vmm_api::block_file`]), and is
//! shown as a regular file of the device's size. Whether it can be written to is the descriptor's affair, and so the
//! host kernel's.
//!
//! Nothing is kept for a guest: a node and every handle to it is the device's number and [`FIRST_NODE`]. So a device
//! that is taken away is gone for a guest that still has it open.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use sandbox_vmm_api::{BLOCK_FILE_PREFIX, MAX_BLOCKS};
use virtiofsd::filesystem::{Entry, OpenOptions, ROOT_ID, ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::fuse::Attr;

use super::VALID_FOR;

/// The first node number. The passthrough counts its own up from 1; those from 2^63 on are of files without a name.
const FIRST_NODE: u64 = 1 << 62;

/// The first node number that is not one of these.
const END_OF_NODES: u64 = 1 << 63;

/// The unit of [`Attr::blocks`].
const ATTR_BLOCK_BYTES: u64 = 512;

/// The block devices of a machine.
#[derive(Clone, Default)]
pub struct Blocks(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    next: u64,
    devices: BTreeMap<u64, Arc<Block>>,
}

struct Block {
    file: File,
    bytes: u64,
    read_only: bool,
}

impl Block {
    fn attributes(&self, node: u64) -> Attr {
        let permissions = if self.read_only { 0o400 } else { 0o600 };
        Attr {
            ino: node,
            size: self.bytes,
            blocks: self.bytes / ATTR_BLOCK_BYTES,
            mode: libc::S_IFREG | permissions,
            nlink: 1,
            blksize: 4096,
            ..Attr::default()
        }
    }
}

impl Blocks {
    /// Shows one more. Returns its number, which no other had before.
    pub fn add(&self, file: File) -> io::Result<u64> {
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0))?;
        let read_only = rustix::fs::fcntl_getfl(&file)? & OFlags::ACCMODE == OFlags::RDONLY;
        let mut state = self.lock();
        if state.devices.len() >= MAX_BLOCKS {
            return Err(io::Error::other(format!(
                "the machine has {MAX_BLOCKS} block devices, which is the limit"
            )));
        }
        let number = state.next;
        state.next += 1;
        state.devices.insert(number, Arc::new(Block { file, bytes, read_only }));
        Ok(number)
    }

    /// Takes one away, from a guest that has it open as well. One that is not there needs no removal.
    pub fn remove(&self, number: u64) {
        self.lock().devices.remove(&number);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a node is one of these.
    pub fn owns(node: u64) -> bool {
        (FIRST_NODE..END_OF_NODES).contains(&node)
    }

    fn find(&self, node: u64) -> io::Result<Arc<Block>> {
        let device = self.lock().devices.get(&node.wrapping_sub(FIRST_NODE)).cloned();
        device.ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
    }

    /// The device of this name in this directory, if it is one.
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> Option<Entry> {
        if parent != ROOT_ID {
            return None;
        }
        let number: u64 = name.to_str().ok()?.strip_prefix(BLOCK_FILE_PREFIX)?.parse().ok()?;
        let inode = FIRST_NODE.checked_add(number).filter(|node| Self::owns(*node))?;
        let attr = self.find(inode).ok()?.attributes(inode);
        Some(Entry { inode, generation: 0, attr, attr_timeout: VALID_FOR, entry_timeout: VALID_FOR })
    }

    pub(super) fn getattr(&self, node: u64) -> io::Result<(Attr, Duration)> {
        Ok((self.find(node)?.attributes(node), VALID_FOR))
    }

    /// The guest's kernel is to keep nothing of it: it caches the device that it makes of the file.
    pub(super) fn open(&self, node: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let wanted = OFlags::from_bits_retain(flags) & OFlags::ACCMODE;
        if self.find(node)?.read_only && wanted != OFlags::RDONLY {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        Ok((Some(node), OpenOptions::DIRECT_IO))
    }

    pub(super) fn read<W: ZeroCopyWriter>(
        &self,
        node: u64,
        mut to: W,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        to.read_from_file_at(&self.find(node)?.file, size as usize, offset, None)
    }

    pub(super) fn write<R: ZeroCopyReader>(
        &self,
        node: u64,
        mut from: R,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        from.write_to_file_at(&self.find(node)?.file, size as usize, offset, None)
    }

    pub(super) fn fsync(&self, node: u64) -> io::Result<()> {
        self.find(node)?.file.sync_data()
    }

    /// What a block device can do of it: discard, and write zeroes.
    pub(super) fn fallocate(&self, node: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::from_bits_retain(mode);
        let able = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !able.contains(mode) || !mode.contains(FallocateFlags::KEEP_SIZE) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        Ok(rustix::fs::fallocate(&self.find(node)?.file, mode, offset, length)?)
    }
}
