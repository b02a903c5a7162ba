//! The file system that the guest is served: virtiofsd's passthrough, with the guest's words checked first.
//!
//! The passthrough resolves every name relative to a descriptor of its parent and never follows a symbolic
//! link, but it takes a name as the guest sent it: `..`, or one with a slash in it, would be resolved by the
//! host. [`Guarded`] lets through only what can be one directory entry's name, makes no device nodes, and sets
//! no extended attribute that only the host's own kernel has a use for. Sizes that the passthrough would
//! allocate unseen are bounded here.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, ROOT_ID,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;

use super::Access;
use super::blocks::Blocks;
use super::tmpfile::{Capture, Tmpfiles};

/// The most bytes of an extended attribute's value, or of the list of names: Linux's own limit.
const XATTR_BYTES_MAX: u32 = 64 * 1024;

/// Extended attributes of the host's kernel: the guest may read them and not set them.
///
/// `trusted.` steers an overlay file system for which the host may use the directory later; of `security.`
/// only the file capabilities belong to the guest's own user land.
const HOST_XATTR_PREFIXES: [&[u8]; 2] = [b"trusted.", b"security."];

/// The one attribute under a host prefix that the guest may set.
const FILE_CAPABILITY_XATTR: &[u8] = b"security.capability";

/// What the passthrough is not told that a client can do, so that it makes files as their owner and yet with the right
/// to make them anywhere (`CAP_DAC_OVERRIDE`).
///
/// Who may make what is the guest kernel's decision (virtio-fs has `default_permissions`), which the host cannot make
/// again: it knows ids and groups, and not the capabilities that a process has in the guest. Root of a user namespace
/// may write to the directories of the other users in it.
const WHOSE_RIGHTS: FsOptions = FsOptions::CREATE_SUPP_GROUP;

/// The passthrough file system behind its checks, and the files that it cannot have: those without a name, and block
/// devices.
#[derive(Clone)]
pub struct Guarded {
    inner: Arc<PassthroughFs>,
    tmpfiles: Arc<Tmpfiles>,
    access: Access,
    blocks: Blocks,
}

impl Guarded {
    /// Puts the checks before a file system.
    pub fn new(inner: PassthroughFs, tmpfiles: Tmpfiles, access: Access, blocks: Blocks) -> Self {
        Self { inner: Arc::new(inner), tmpfiles: Arc::new(tmpfiles), access, blocks }
    }

    /// Refuses a change where nothing is to be changed: the thread that serves has no right to, then.
    fn check_change(&self) -> io::Result<()> {
        match self.access {
            Access::ReadOnly => Err(io::Error::from_raw_os_error(libc::EROFS)),
            Access::ReadWrite => Ok(()),
        }
    }

    /// Makes a file without a name in a directory, and opens it.
    pub fn tmpfile(&self, context: Context, parent: u64, mode: u32, umask: u32) -> io::Result<(Entry, u64)> {
        self.check_change()?;
        if mode & libc::S_IFMT != libc::S_IFREG {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let directory = self.directory(context, parent)?;
        self.tmpfiles.create(directory.as_fd(), &context, mode, umask)
    }

    /// Gives a file without a name its first.
    fn link_tmpfile(&self, context: Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let directory = self.directory(context, parent)?;
        self.tmpfiles.link(node, directory.as_fd(), name)?;
        self.inner.lookup(context, parent, name)
    }

    /// A descriptor of a directory that the passthrough knows.
    fn directory(&self, context: Context, node: u64) -> io::Result<File> {
        let bad = || io::Error::from_raw_os_error(libc::EBADF);
        let (handle, _) = self.inner.opendir(context, node, libc::O_DIRECTORY as u32)?;
        let handle = handle.ok_or_else(bad)?;
        let mut file = None;
        let read = self.inner.read(context, node, handle, Capture(&mut file), 0, 0, None, 0);
        self.inner.releasedir(context, node, 0, handle)?;
        read?;
        file.unwrap_or_else(|| Err(bad()))
    }
}

/// Refuses what cannot be the name of one directory entry.
fn check_name(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(())
}

/// Refuses to make device nodes: the host would honour them wherever the directory is not mounted `nodev`.
fn check_node_type(mode: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | 0 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

/// Refuses to set the attributes that belong to the host.
fn check_xattr_name(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes != FILE_CAPABILITY_XATTR && HOST_XATTR_PREFIXES.iter().any(|prefix| bytes.starts_with(prefix)) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    Ok(())
}

/// Refuses what is no place in a file. The library below panics on it.
fn check_offset(offset: u64) -> io::Result<()> {
    i64::try_from(offset).map(drop).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Whether a file that is opened so is to be changed, if only by the opening.
fn is_change(flags: u32) -> bool {
    flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 || flags & libc::O_TRUNC as u32 != 0
}

/// Passes each operation on to the passthrough: after the checks that are named, `at` which place of a file, `first` one
/// of the whole file system and then one of the operation, and to the files without a name where one of these is meant
/// and `own` says how. What is meant for a block device goes by `block`, whatever may be changed of files; the
/// passthrough does not know these, and refuses what nobody says how to do.
macro_rules! pass_on {
    {$(
        fn $name:ident$(<$generic:ident: $bound:path>)?(
            &self $(, $argument:ident: $type:ty)* $(,)?
        ) $(-> $ret:ty)? $(, at $offset:ident)? $(, first $first:ident)? $(, check $check:expr)?
        $(, own $node:ident $own:expr)? $(, block $device:ident $block:expr)?;
    )*} => {$(
        #[inline]
        #[allow(clippy::too_many_arguments)]
        fn $name$(<$generic: $bound>)?(&self $(, $argument: $type)*) $(-> $ret)? {
            $(check_offset($offset)?;)?
            $(if Blocks::owns($device) {
                return call(&self.blocks, $block);
            })?
            $(self.$first()?;)?
            $($check?;)?
            $(if Tmpfiles::owns($node) {
                return call(&*self.tmpfiles, $own);
            })?
            self.inner.$name($($argument),*)
        }
    )*};
}

/// Lets a closure that takes the files know their type.
fn call<F, R>(files: &F, operation: impl FnOnce(&F) -> R) -> R {
    operation(files)
}

impl FileSystem for Guarded {
    type Inode = <PassthroughFs as FileSystem>::Inode;
    type Handle = <PassthroughFs as FileSystem>::Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    pass_on! {
        fn forget(&self, ctx: Context, inode: Self::Inode, count: u64),
            own inode |files| files.forget(inode, count), block inode |_blocks| ();
        fn getattr(
            &self, ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>,
        ) -> io::Result<(fuse::Attr, Duration)>, own inode |files| files.getattr(inode),
            block inode |blocks| blocks.getattr(inode);
        fn setattr(
            &self, ctx: Context, inode: Self::Inode, attr: fuse::SetattrIn, handle: Option<Self::Handle>,
            valid: SetattrValid,
        ) -> io::Result<(fuse::Attr, Duration)>, first check_change,
            own inode |files| files.setattr(inode, &attr, valid);
        fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>>;
        fn symlink(
            &self, ctx: Context, linkname: &CStr, parent: Self::Inode, name: &CStr, extensions: Extensions,
        ) -> io::Result<Entry>, first check_change, check check_name(name);
        fn mknod(
            &self, ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, rdev: u32, umask: u32,
            extensions: Extensions,
        ) -> io::Result<Entry>, first check_change,
            check check_name(name).and_then(|()| check_node_type(mode));
        fn mkdir(
            &self, ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, umask: u32,
            extensions: Extensions,
        ) -> io::Result<Entry>, first check_change, check check_name(name);
        fn unlink(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()>,
            first check_change, check check_name(name);
        fn rmdir(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()>,
            first check_change, check check_name(name);
        fn rename(
            &self, ctx: Context, olddir: Self::Inode, oldname: &CStr, newdir: Self::Inode, newname: &CStr,
            flags: u32,
        ) -> io::Result<()>, first check_change,
            check check_name(oldname).and_then(|()| check_name(newname));
        fn create(
            &self, ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, kill_priv: bool, flags: u32,
            umask: u32, extensions: Extensions,
        ) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)>, first check_change,
            check check_name(name);
        fn read<W: ZeroCopyWriter>(
            &self, ctx: Context, inode: Self::Inode, handle: Self::Handle, w: W, size: u32, offset: u64,
            lock_owner: Option<u64>, flags: u32,
        ) -> io::Result<usize>, at offset, own inode |files| files.read(handle, w, size, offset),
            block inode |blocks| blocks.read(inode, w, size, offset);
        fn write<R: ZeroCopyReader>(
            &self, ctx: Context, inode: Self::Inode, handle: Self::Handle, r: R, size: u32, offset: u64,
            lock_owner: Option<u64>, delayed_write: bool, kill_priv: bool, flags: u32,
        ) -> io::Result<usize>, at offset, first check_change, own inode |files| {
            files.write(handle, r, size, offset, delayed_write, kill_priv, flags)
        }, block inode |blocks| blocks.write(inode, r, size, offset);
        fn flush(
            &self, ctx: Context, inode: Self::Inode, handle: Self::Handle, lock_owner: u64,
        ) -> io::Result<()>, own inode |_files| Ok(()), block inode |_blocks| Ok(());
        fn fsync(
            &self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle,
        ) -> io::Result<()>, own inode |files| files.fsync(handle, datasync), block inode |blocks| blocks.fsync(inode);
        fn fallocate(
            &self, ctx: Context, inode: Self::Inode, handle: Self::Handle, mode: u32, offset: u64,
            length: u64,
        ) -> io::Result<()>, first check_change,
            own inode |files| files.fallocate(handle, mode, offset, length),
            block inode |blocks| blocks.fallocate(inode, mode, offset, length);
        fn release(
            &self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle, flush: bool,
            flock_release: bool, lock_owner: Option<u64>,
        ) -> io::Result<()>, own inode |files| files.release(handle), block inode |_blocks| Ok(());
        fn setxattr(
            &self, ctx: Context, inode: Self::Inode, name: &CStr, value: &[u8], flags: u32,
            extra_flags: SetxattrFlags,
        ) -> io::Result<()>, first check_change, check check_xattr_name(name),
            own inode |files| files.setxattr(inode, name, value, flags);
        fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()>,
            first check_change,
            check check_xattr_name(name), own inode |files| files.removexattr(inode, name);
        fn opendir(
            &self, ctx: Context, inode: Self::Inode, flags: u32,
        ) -> io::Result<(Option<Self::Handle>, OpenOptions)>;
        fn readdir(
            &self, ctx: Context, inode: Self::Inode, handle: Self::Handle, size: u32, offset: u64,
        ) -> io::Result<Self::DirIter>;
        fn fsyncdir(
            &self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle,
        ) -> io::Result<()>;
        fn releasedir(
            &self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle,
        ) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()>;
        fn lseek(
            &self, ctx: Context, inode: Self::Inode, handle: Self::Handle, offset: u64, whence: u32,
        ) -> io::Result<u64>, own inode |files| files.lseek(handle, offset, whence);
        fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()>;
    }

    fn lookup(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.blocks.lookup(parent, name).map_or_else(|| self.inner.lookup(ctx, parent, name), Ok)
    }

    fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64> {
        match inode {
            _ if Tmpfiles::owns(inode) => self.tmpfiles.statfs(inode),
            _ if Blocks::owns(inode) => self.inner.statfs(ctx, ROOT_ID),
            _ => self.inner.statfs(ctx, inode),
        }
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.tmpfiles.clear();
        // Without it the passthrough would complain on standard error, as often as a guest likes.
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        // Where a link leads never changes: another link is another inode.
        let links = capable & FsOptions::CACHE_SYMLINKS;
        let wanted = self.inner.init(capable - WHOSE_RIGHTS)? | links;
        tracing::debug!(?capable, ?wanted, "a client of the share begins");
        Ok(wanted)
    }

    fn destroy(&self) {
        self.tmpfiles.clear();
        self.inner.destroy();
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>) {
        let (own, others): (Vec<_>, _) = requests.into_iter().partition(|(inode, _)| Tmpfiles::owns(*inode));
        for (inode, count) in own {
            self.tmpfiles.forget(inode, count);
        }
        self.inner.batch_forget(ctx, others);
    }

    fn link(
        &self,
        ctx: Context,
        inode: Self::Inode,
        newparent: Self::Inode,
        newname: &CStr,
    ) -> io::Result<Entry> {
        self.check_change()?;
        check_name(newname)?;
        if Tmpfiles::owns(inode) {
            return self.link_tmpfile(ctx, inode, newparent, newname);
        }
        self.inner.link(ctx, inode, newparent, newname)
    }

    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        if Blocks::owns(inode) {
            return self.blocks.open(inode, flags);
        }
        if is_change(flags) {
            self.check_change()?;
        }
        if Tmpfiles::owns(inode) {
            return self.tmpfiles.open(inode, kill_priv, flags);
        }
        self.inner.open(ctx, inode, kill_priv, flags)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Self::Inode,
        handle_in: Self::Handle,
        offset_in: u64,
        inode_out: Self::Inode,
        handle_out: Self::Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.check_change()?;
        if Tmpfiles::owns(inode_in) || Tmpfiles::owns(inode_out) {
            // The guest's kernel copies by itself then.
            return Err(io::Error::from_raw_os_error(libc::EXDEV));
        }
        self.inner
            .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let size = size.min(XATTR_BYTES_MAX);
        if Tmpfiles::owns(inode) {
            return self.tmpfiles.getxattr(inode, name, size);
        }
        self.inner.getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply> {
        let size = size.min(XATTR_BYTES_MAX);
        if Tmpfiles::owns(inode) {
            return self.tmpfiles.listxattr(inode, size);
        }
        self.inner.listxattr(ctx, inode, size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_one_entry_pass() {
        for good in [c"a", c"...", c".hidden", c"a b", c"\xff"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"/etc", c"../x"] {
            assert_eq!(check_name(bad).unwrap_err().raw_os_error(), Some(libc::EINVAL), "{bad:?}");
        }
    }

    #[test]
    fn opening_to_read_is_no_change() {
        for (flags, change) in [
            (libc::O_RDONLY, false),
            (libc::O_RDONLY | libc::O_NOATIME | libc::O_DIRECTORY, false),
            (libc::O_RDONLY | libc::O_TRUNC, true),
            (libc::O_WRONLY, true),
            (libc::O_RDWR, true),
            (libc::O_ACCMODE, true),
        ] {
            assert_eq!(is_change(flags as u32), change, "{flags:#o}");
        }
    }

    #[test]
    fn device_nodes_are_refused() {
        for good in [libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK] {
            assert!(check_node_type(good | 0o644).is_ok());
        }
        for bad in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR, libc::S_IFLNK, 0o030000] {
            assert_eq!(check_node_type(bad | 0o644).unwrap_err().raw_os_error(), Some(libc::EPERM));
        }
    }

    #[test]
    fn attributes_of_the_host_are_refused() {
        for good in [c"user.a", c"security.capability", c"system.posix_acl_access"] {
            assert!(check_xattr_name(good).is_ok(), "{good:?}");
        }
        for bad in [c"trusted.overlay.redirect", c"security.selinux", c"security.capabilityx"] {
            assert!(check_xattr_name(bad).is_err(), "{bad:?}");
        }
    }
}
