//! Files without a name: `O_TMPFILE`.
//!
//! virtiofsd's server does not know the FUSE operation `TMPFILE`, and its passthrough finds every file by a
//! name, so these files are kept here, with node and handle numbers from [`FIRST_ID`] on, which the passthrough
//! does not reach. A file that is given a name by a link is found under that name by the passthrough like any
//! other; what the guest still has open stays here.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags};
use rustix::process::{Gid, Uid};
use virtiofsd::filesystem::{
    Context, Entry, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::{ScopedUmask, WritevFlags};
use virtiofsd::passthrough::credentials::{UnixCredentials, drop_effective_cap};
use virtiofsd::soft_idmap::{GuestGid, GuestUid, HostGid, HostUid, Id};

use super::VALID_FOR;

/// The first of the node and handle numbers here. The passthrough counts its own up from 1.
const FIRST_ID: u64 = 1 << 63;

/// The most files of this kind at a time.
const FILES_MAX: usize = 512;

/// The most times that they are open.
const HANDLES_MAX: usize = 1024;

/// The files without a name that the guest has.
pub struct Tmpfiles {
    /// `/proc/self/fd`, by which a file that has no name is named.
    descriptors: File,
    state: Mutex<State>,
}

struct State {
    nodes: HashMap<u64, Node>,
    handles: HashMap<u64, Arc<File>>,
    next_id: u64,
}

struct Node {
    file: Arc<File>,
    /// How many times the guest will say that it forgets the node.
    lookups: u64,
}

impl State {
    fn id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = id.checked_add(1).unwrap_or(FIRST_ID);
        id
    }
}

fn bad_descriptor() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

impl Tmpfiles {
    /// None yet. `descriptors` is an open `/proc/self/fd`.
    pub fn new(descriptors: File) -> Self {
        let state = State { nodes: HashMap::new(), handles: HashMap::new(), next_id: FIRST_ID };
        Self { descriptors, state: Mutex::new(state) }
    }

    /// Whether a node is one of these.
    pub fn owns(node: u64) -> bool {
        node >= FIRST_ID
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a file in a directory, as the guest's user, and opens it.
    pub fn create(
        &self,
        directory: BorrowedFd<'_>,
        context: &Context,
        mode: u32,
        umask: u32,
    ) -> io::Result<(Entry, u64)> {
        self.check_room()?;
        let file = Arc::new(make(directory, context, mode, umask)?);
        let attr = attributes(&file)?;
        let mut state = self.lock();
        let (node, handle) = (state.id(), state.id());
        state.nodes.insert(node, Node { file: file.clone(), lookups: 1 });
        state.handles.insert(handle, file);
        let entry =
            Entry { inode: node, generation: 0, attr, attr_timeout: VALID_FOR, entry_timeout: VALID_FOR };
        Ok((entry, handle))
    }

    fn check_room(&self) -> io::Result<()> {
        let state = self.lock();
        if state.nodes.len() >= FILES_MAX || state.handles.len() >= HANDLES_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        Ok(())
    }

    fn node(&self, node: u64) -> io::Result<Arc<File>> {
        self.lock().nodes.get(&node).map(|node| node.file.clone()).ok_or_else(bad_descriptor)
    }

    fn handle(&self, handle: u64) -> io::Result<Arc<File>> {
        self.lock().handles.get(&handle).cloned().ok_or_else(bad_descriptor)
    }

    /// Forgets all: a new client begins.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.nodes.clear();
        state.handles.clear();
    }

    pub fn forget(&self, node: u64, count: u64) {
        let mut state = self.lock();
        if let Some(found) = state.nodes.get_mut(&node) {
            found.lookups = found.lookups.saturating_sub(count);
            if found.lookups == 0 {
                state.nodes.remove(&node);
            }
        }
    }

    pub fn getattr(&self, node: u64) -> io::Result<(Attr, std::time::Duration)> {
        Ok((attributes(&*self.node(node)?)?, VALID_FOR))
    }

    pub fn setattr(
        &self,
        node: u64,
        attr: &SetattrIn,
        valid: SetattrValid,
    ) -> io::Result<(Attr, std::time::Duration)> {
        let file = self.node(node)?;
        if valid.contains(SetattrValid::MODE) {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(attr.mode & 0o7777))?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(attr.uid.into_inner()));
            let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(attr.gid.into_inner()));
            rustix::fs::fchown(&file, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _weakened = without_privileges(valid.contains(SetattrValid::KILL_SUIDGID))?;
            rustix::fs::ftruncate(&file, attr.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            rustix::fs::futimens(&file, &times(attr, valid))?;
        }
        Ok((attributes(&file)?, VALID_FOR))
    }

    /// Opens a file once more, through its descriptor.
    pub fn open(&self, node: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.check_room()?;
        let file = self.node(node)?;
        let wanted = OFlags::from_bits_retain(flags) & (OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC);
        let opened = {
            let _weakened = without_privileges(kill_priv)?;
            let name = file.as_raw_fd().to_string();
            rustix::fs::openat(&self.descriptors, name, wanted | OFlags::CLOEXEC, Mode::empty())?
        };
        let mut state = self.lock();
        let handle = state.id();
        state.handles.insert(handle, Arc::new(opened.into()));
        Ok((Some(handle), OpenOptions::KEEP_CACHE))
    }

    pub fn read<W: ZeroCopyWriter>(
        &self,
        handle: u64,
        mut to: W,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        to.read_from_file_at(&*self.handle(handle)?, size as usize, offset, None)
    }

    #[allow(clippy::too_many_arguments)]
    pub fn write<R: ZeroCopyReader>(
        &self,
        handle: u64,
        mut from: R,
        size: u32,
        offset: u64,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let file = self.handle(handle)?;
        let _weakened = without_privileges(kill_priv)?;
        let append = !delayed_write && flags & libc::O_APPEND as u32 != 0;
        from.write_to_file_at(&file, size as usize, offset, append.then_some(WritevFlags::RWF_APPEND))
    }

    pub fn fsync(&self, handle: u64, data_only: bool) -> io::Result<()> {
        let file = self.handle(handle)?;
        if data_only { file.sync_data() } else { file.sync_all() }
    }

    pub fn fallocate(&self, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode);
        Ok(rustix::fs::fallocate(&*self.handle(handle)?, mode, offset, length)?)
    }

    /// Finds data or a hole; nothing else is asked of a server.
    pub fn lseek(&self, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        use rustix::fs::SeekFrom;
        let to = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        Ok(rustix::fs::seek(&*self.handle(handle)?, to)?)
    }

    pub fn release(&self, handle: u64) -> io::Result<()> {
        self.lock().handles.remove(&handle).map(drop).ok_or_else(bad_descriptor)
    }

    /// Gives a file a name.
    pub fn link(&self, node: u64, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let file = self.node(node)?;
        let old = file.as_raw_fd().to_string();
        Ok(rustix::fs::linkat(&self.descriptors, old, directory, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    pub fn statfs(&self, node: u64) -> io::Result<libc::statvfs64> {
        let file = self.node(node)?;
        let mut figures = MaybeUninit::<libc::statvfs64>::zeroed();
        // SAFETY: the kernel fills the structure that it is given, or says that it did not; all zeroes is a
        // valid one, too.
        unsafe {
            match libc::fstatvfs64(file.as_raw_fd(), figures.as_mut_ptr()) {
                0 => Ok(figures.assume_init()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    pub fn setxattr(&self, node: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        Ok(rustix::fs::fsetxattr(&*self.node(node)?, name, value, XattrFlags::from_bits_retain(flags))?)
    }

    pub fn getxattr(&self, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let file = self.node(node)?;
        let mut value = vec![0; size as usize];
        let length = rustix::fs::fgetxattr(&file, name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(length as u32));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    pub fn listxattr(&self, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let file = self.node(node)?;
        let mut names = vec![0; size as usize];
        let length = rustix::fs::flistxattr(&file, &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(length as u32));
        }
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    pub fn removexattr(&self, node: u64, name: &CStr) -> io::Result<()> {
        Ok(rustix::fs::fremovexattr(&*self.node(node)?, name)?)
    }
}

fn make(directory: BorrowedFd<'_>, context: &Context, mode: u32, umask: u32) -> io::Result<File> {
    // The guest's kernel has checked the permission with all groups of its user, which are not known here.
    let (uid, gid) = (HostUid::from(context.uid.into_inner()), HostGid::from(context.gid.into_inner()));
    let _credentials = UnixCredentials::new(uid, gid).supplementary_gid(false, Vec::new()).set()?;
    let _umask = ScopedUmask::new(umask);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, c".", flags, Mode::from_raw_mode(mode & 0o7777))?;
    Ok(file.into())
}

/// Lets the host's kernel take set-user-id bits off a file, which it does not for a privileged writer.
fn without_privileges(wanted: bool) -> io::Result<Option<impl Drop>> {
    if wanted { drop_effective_cap("FSETID") } else { Ok(None) }
}

fn attributes(file: &File) -> io::Result<Attr> {
    let data = file.metadata()?;
    Ok(Attr {
        ino: data.ino(),
        size: data.size(),
        blocks: data.blocks(),
        atime: data.atime() as u64,
        mtime: data.mtime() as u64,
        ctime: data.ctime() as u64,
        atimensec: data.atime_nsec() as u32,
        mtimensec: data.mtime_nsec() as u32,
        ctimensec: data.ctime_nsec() as u32,
        mode: data.mode(),
        nlink: data.nlink() as u32,
        uid: GuestUid::from(data.uid()),
        gid: GuestGid::from(data.gid()),
        rdev: data.rdev() as u32,
        blksize: data.blksize() as u32,
        flags: 0,
    })
}

fn times(attr: &SetattrIn, valid: SetattrValid) -> Timestamps {
    let time = |given, now, seconds: u64, nanoseconds: u32| {
        if valid.contains(now) {
            Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }
        } else if valid.contains(given) {
            Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds.into() }
        } else {
            Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }
        }
    };
    Timestamps {
        last_access: time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, attr.atime, attr.atimensec),
        last_modification: time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, attr.mtime, attr.mtimensec),
    }
}

/// Gets hold of an open file of the passthrough, which hands one out only to be read from.
pub struct Capture<'a>(pub &'a mut Option<io::Result<File>>);

impl ZeroCopyWriter for Capture<'_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _count: usize,
        _offset: u64,
        _flags: Option<virtiofsd::oslib::ReadvFlags>,
    ) -> io::Result<usize> {
        *self.0 = Some(file.as_fd().try_clone_to_owned().map(File::from));
        Ok(0)
    }
}
