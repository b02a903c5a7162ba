//! The device, driven through real queues with raw FUSE messages.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use tempfile::TempDir;
use virtiofsd::fuse::{self, Opcode};
use vm_memory::ByteValued;

use super::blocks::Blocks;
use super::{Access, Fs};
use crate::devices::testing::{self, Driver, Part};
use crate::virtio::{GuestMemory, VirtioDevice};

const REQUESTS: usize = 1;
/// The flag of FUSE's `init`, of the kernel's `include/uapi/linux/fuse.h`.
const FUSE_CACHE_SYMLINKS: u32 = 1 << 23;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const ROOM: u32 = 64 * 1024;

/// A FUSE client with the directory that it is served.
struct Client {
    fs: Fs,
    memory: GuestMemory,
    drivers: [Driver; 2],
    directory: TempDir,
    blocks: Blocks,
}

/// A reply: the error number, or what follows the header.
type Reply = Result<Vec<u8>, i32>;

impl Client {
    fn new() -> Self {
        Self::with(Access::ReadWrite)
    }

    fn with(access: Access) -> Self {
        let mut client = Self::without_init(access);
        let init = fuse::InitInCompat { major: 7, minor: 41, max_readahead: 128 * 1024, flags: u32::MAX };
        let ext = [0u8; size_of::<fuse::InitInExt>()];
        let reply = client.request(Opcode::Init, 0, &[init.as_slice(), &ext]).unwrap();
        let out: fuse::InitOut = read(&reply);
        assert_eq!((out.major, out.max_write), (7, 1 << 20));
        assert_ne!(out.flags & FUSE_CACHE_SYMLINKS, 0);
        client
    }

    fn without_init(access: Access) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let descriptors = File::open("/proc/self/fd").unwrap();
        let blocks = Blocks::default();
        let fs = Fs::new("share", directory.path(), access, descriptors, blocks.clone()).unwrap();
        let memory = testing::memory();
        let drivers = [0, 1].map(|queue| Driver::new(&memory, queue, 128));
        Self { fs, memory, drivers, directory, blocks }
    }

    /// Sends a request and takes its reply.
    fn request(&mut self, opcode: Opcode, node: u64, body: &[&[u8]]) -> Reply {
        let (bytes, written) = self.send(&message(opcode as u32, node, body), ROOM);
        assert_eq!(bytes.len(), written);
        let header: fuse::OutHeader = read(&bytes);
        assert_eq!((header.len as usize, header.unique), (written, 7));
        if header.error == 0 { Ok(bytes[OUT_HEADER..].to_vec()) } else { Err(-header.error) }
    }

    /// Offers any bytes; returns what was written to the reply's room, and the length in the used ring.
    fn send(&mut self, message: &[u8], room: u32) -> (Vec<u8>, usize) {
        let (first, second) = message.split_at(message.len().min(IN_HEADER));
        let offered =
            self.drivers[REQUESTS].offer(&[Part::Read(first), Part::Read(second), Part::Write(room)]);
        testing::notify(&mut self.fs, REQUESTS, &mut self.drivers, &self.memory).unwrap();
        let used = self.drivers[REQUESTS].used();
        assert_eq!(used.len(), 1);
        let written = used[0].1 as usize;
        let mut bytes = self.drivers[REQUESTS].read(offered.buffers[2]);
        bytes.truncate(written);
        (bytes, written)
    }

    fn create(&mut self, name: &str) -> (fuse::EntryOut, fuse::OpenOut) {
        let asked = fuse::CreateIn {
            flags: (libc::O_RDWR | libc::O_CREAT) as u32,
            mode: libc::S_IFREG | 0o644,
            umask: 0o022,
            open_flags: 0,
        };
        let name = terminated(name);
        let reply = self.request(Opcode::Create, 1, &[asked.as_slice(), &name]).unwrap();
        (read(&reply), read(&reply[size_of::<fuse::EntryOut>()..]))
    }

    fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Reply {
        let asked = fuse::WriteIn { fh: handle, size: data.len() as u32, ..Default::default() };
        self.request(Opcode::Write, node, &[asked.as_slice(), data])
    }

    fn read(&mut self, node: u64, handle: u64, size: u32) -> Reply {
        let asked = fuse::ReadIn { fh: handle, size, ..Default::default() };
        self.request(Opcode::Read, node, &[asked.as_slice()])
    }

    fn lookup(&mut self, name: &str) -> Result<fuse::EntryOut, i32> {
        self.request(Opcode::Lookup, 1, &[&terminated(name)]).map(|reply| read(&reply))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<fuse::OpenOut, i32> {
        let asked = fuse::OpenIn { flags: flags as u32, open_flags: 0 };
        self.request(Opcode::Open, node, &[asked.as_slice()]).map(|reply| read(&reply))
    }

    fn mknod(&mut self, name: &str, mode: u32) -> Reply {
        let asked = fuse::MknodIn { mode, rdev: 0x103, ..Default::default() };
        self.request(Opcode::Mknod, 1, &[asked.as_slice(), &terminated(name)])
    }
}

fn message(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let len = (IN_HEADER + body.len()) as u32;
    let header = fuse::InHeader { len, opcode, unique: 7, nodeid: node, ..Default::default() };
    [header.as_slice(), &body].concat()
}

fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

/// The value at the front of some bytes.
fn read<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

#[test]
fn the_configuration_is_the_tag_and_one_request_queue() {
    let client = Client::without_init(Access::ReadWrite);
    let mut config = [0xff; 44];
    client.fs.read_config(0, &mut config);
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(config[36..44], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_file_is_made_written_and_read() {
    let mut client = Client::new();
    let (entry, open) = client.create("file");
    client.write(entry.nodeid, open.fh, b"content").unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, 100).unwrap(), b"content");
    assert_eq!(std::fs::read(client.directory.path().join("file")).unwrap(), b"content");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let mut client = Client::new();
    std::fs::create_dir(client.directory.path().join("sub")).unwrap();
    for name in ["..", ".", "", "/etc", "sub/x", "../x"] {
        let name = terminated(name);
        assert_eq!(client.request(Opcode::Lookup, 1, &[&name]), Err(libc::EINVAL));
        assert_eq!(client.request(Opcode::Unlink, 1, &[&name]), Err(libc::EINVAL));
        let mode = fuse::MkdirIn { mode: 0o755, umask: 0 };
        assert_eq!(client.request(Opcode::Mkdir, 1, &[mode.as_slice(), &name]), Err(libc::EINVAL));
    }
}

#[test]
fn a_symbolic_link_is_shown_and_never_followed() {
    let mut client = Client::new();
    std::os::unix::fs::symlink("/etc/passwd", client.directory.path().join("link")).unwrap();
    let reply = client.request(Opcode::Lookup, 1, &[b"link\0"]).unwrap();
    let entry: fuse::EntryOut = read(&reply);
    assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let open = fuse::OpenIn { flags: libc::O_RDONLY as u32, open_flags: 0 };
    assert!(client.request(Opcode::Open, entry.nodeid, &[open.as_slice()]).is_err());
    assert_eq!(client.request(Opcode::Readlink, entry.nodeid, &[]).unwrap(), b"/etc/passwd");
}

#[test]
fn device_nodes_are_refused_and_pipes_are_not() {
    let mut client = Client::new();
    assert_eq!(client.mknod("null", libc::S_IFCHR | 0o666), Err(libc::EPERM));
    assert_eq!(client.mknod("disk", libc::S_IFBLK | 0o666), Err(libc::EPERM));
    client.mknod("pipe", libc::S_IFIFO | 0o600).unwrap();
    let made = std::fs::symlink_metadata(client.directory.path().join("pipe")).unwrap();
    assert!(made.file_type().is_fifo());
    assert!(!client.directory.path().join("null").exists());
}

/// What stands for a block device here: its size does not change either.
fn disk(client: &Client, flags: rustix::fs::OFlags) -> File {
    let path = client.directory.path().with_extension("disk");
    std::fs::write(&path, [7; 8192]).unwrap();
    let opened = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    std::fs::remove_file(path).unwrap();
    opened.into()
}

#[test]
fn a_block_device_is_a_file_of_its_size_until_it_is_taken_away() {
    let mut client = Client::new();
    assert_eq!(client.lookup("@block0").unwrap_err(), libc::ENOENT);
    let file = disk(&client, rustix::fs::OFlags::RDWR);
    let number = client.blocks.add(file.try_clone().unwrap()).unwrap();
    let entry = client.lookup("@block0").unwrap();
    assert_eq!((number, entry.attr.size, entry.attr.mode), (0, 8192, libc::S_IFREG | 0o600));

    let open = client.open(entry.nodeid, libc::O_RDWR).unwrap();
    client.write(entry.nodeid, open.fh, b"head").unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, ROOM).unwrap()[..6], *b"head\x07\x07");
    client.request(Opcode::Fsync, entry.nodeid, &[fuse::FsyncIn::default().as_slice()]).unwrap();
    client.request(Opcode::Statfs, entry.nodeid, &[]).unwrap();
    let punch =
        |mode: i32| fuse::FallocateIn { fh: open.fh, length: 4096, mode: mode as u32, ..Default::default() };
    let discard = punch(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
    client.request(Opcode::Fallocate, entry.nodeid, &[discard.as_slice()]).unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, ROOM).unwrap()[..4096], [0; 4096]);
    // It is a device: neither larger nor somebody else's, and it has no attributes.
    let grow = punch(0);
    let refused = client.request(Opcode::Fallocate, entry.nodeid, &[grow.as_slice()]);
    assert_eq!(refused, Err(libc::EOPNOTSUPP));
    let truncate = fuse::SetattrIn { valid: 1 << 3, size: 1, ..Default::default() };
    assert!(client.request(Opcode::Setattr, entry.nodeid, &[truncate.as_slice()]).is_err());
    assert!(client.request(Opcode::Unlink, 1, &[b"@block0\0"]).is_err());
    assert_eq!(file.metadata().unwrap().len(), 8192);

    client.blocks.remove(number);
    assert_eq!(client.read(entry.nodeid, open.fh, 4), Err(libc::EIO));
    assert_eq!(client.write(entry.nodeid, open.fh, b"late"), Err(libc::EIO));
    assert_eq!(client.lookup("@block0").unwrap_err(), libc::ENOENT);
    assert_eq!(client.blocks.add(file).unwrap(), 1);
}

#[test]
fn a_block_device_that_is_open_for_reading_is_not_written_to() {
    let mut client = Client::new();
    let file = disk(&client, rustix::fs::OFlags::RDONLY);
    client.blocks.add(file).unwrap();
    let entry = client.lookup("@block0").unwrap();
    assert_eq!(client.open(entry.nodeid, libc::O_RDWR).unwrap_err(), libc::EROFS);
    let open = client.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, ROOM).unwrap(), [7; 8192]);
    // A guest that does not keep to how it opened meets the host's kernel.
    assert_eq!(client.write(entry.nodeid, open.fh, b"x"), Err(libc::EBADF));
    // No name but its own leads to a device, and none below the top.
    for name in ["@block", "@block1", "@block-0", "@block99999999999999999999"] {
        assert_eq!(client.lookup(name).unwrap_err(), libc::ENOENT, "{name}");
    }
}

#[test]
fn a_file_without_a_name_gets_one_by_a_link() {
    let mut client = Client::new();
    let asked = fuse::CreateIn {
        flags: libc::O_RDWR as u32,
        mode: libc::S_IFREG | 0o666,
        umask: 0o022,
        open_flags: 0,
    };
    let reply = client.request(Opcode::TmpFile, 1, &[asked.as_slice(), b"/\0"]).unwrap();
    let entry: fuse::EntryOut = read(&reply);
    let open: fuse::OpenOut = read(&reply[size_of::<fuse::EntryOut>()..]);
    assert_eq!((entry.attr.nlink, entry.attr.mode), (0, libc::S_IFREG | 0o644));
    client.write(entry.nodeid, open.fh, b"nameless").unwrap();
    assert_eq!(std::fs::read_dir(client.directory.path()).unwrap().count(), 0);

    let link = fuse::LinkIn { oldnodeid: entry.nodeid };
    client.request(Opcode::Link, 1, &[link.as_slice(), b"named\0"]).unwrap();
    let path = client.directory.path().join("named");
    assert_eq!(std::fs::read(&path).unwrap(), b"nameless");
    assert_eq!(std::fs::metadata(&path).unwrap().nlink(), 1);

    client.write(entry.nodeid, open.fh, b"NAME").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"NAMEless");
    let release = fuse::ReleaseIn { fh: open.fh, ..Default::default() };
    client.request(Opcode::Release, entry.nodeid, &[release.as_slice()]).unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, 8), Err(libc::EBADF));
    let forget = fuse::ForgetIn { nlookup: 1 };
    let (_, written) = client.send(&message(Opcode::Forget as u32, entry.nodeid, &[forget.as_slice()]), ROOM);
    assert_eq!(written, 0);
    let getattr = fuse::GetattrIn::default();
    assert_eq!(client.request(Opcode::Getattr, entry.nodeid, &[getattr.as_slice()]), Err(libc::EBADF));
}

#[test]
fn files_without_a_name_are_bounded() {
    let mut client = Client::new();
    let asked =
        fuse::CreateIn { flags: libc::O_RDWR as u32, mode: libc::S_IFREG | 0o600, ..Default::default() };
    let mut made = 0;
    let refused = loop {
        match client.request(Opcode::TmpFile, 1, &[asked.as_slice(), b"/\0"]) {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
        assert!(made <= 512);
    };
    assert_eq!((made, refused), (512, libc::ENFILE));
}

#[test]
fn places_that_no_file_has_are_refused() {
    let mut client = Client::new();
    let (entry, open) = client.create("file");
    let device = disk(&client, rustix::fs::OFlags::RDWR);
    let block = client.blocks.add(device).unwrap();
    let block = client.lookup(&sandbox_vmm_api::block_file(block)).unwrap();
    for (node, handle) in [(entry.nodeid, open.fh), (block.nodeid, block.nodeid), (1 << 63, 0)] {
        for offset in [1 << 63, u64::MAX] {
            let read = fuse::ReadIn { fh: handle, offset, size: 8, ..Default::default() };
            assert_eq!(client.request(Opcode::Read, node, &[read.as_slice()]), Err(libc::EINVAL));
            let write = fuse::WriteIn { fh: handle, offset, size: 8, ..Default::default() };
            let body = [write.as_slice(), &[0; 8]];
            assert_eq!(client.request(Opcode::Write, node, &body), Err(libc::EINVAL));
        }
    }
}

#[test]
fn sizes_that_the_guest_makes_up_allocate_nothing_of_that_size() {
    let mut client = Client::new();
    let (entry, _) = client.create("file");
    for (size, answer) in [(u32::MAX, libc::ENOMEM), (1 << 20, libc::ENODATA)] {
        let asked = fuse::GetxattrIn { size, padding: 0 };
        let reply = client.request(Opcode::Getxattr, entry.nodeid, &[asked.as_slice(), b"user.none\0"]);
        assert_eq!(reply, Err(answer), "{size}");
    }
}

#[test]
fn a_reply_has_no_more_room_than_the_largest_has_bytes() {
    let mut client = Client::new();
    let request = message(Opcode::Readdir as u32, 1, &[&[0; 40]]);
    let same = Part::WriteAt(1 << 20, 1 << 20);
    client.drivers[REQUESTS].offer(&[Part::Read(&request), same, same, same]);
    let broken = testing::notify(&mut client.fs, REQUESTS, &mut client.drivers, &client.memory).unwrap_err();
    assert!(broken.to_string().contains("of 3145808 bytes"), "{broken}");
}

#[test]
fn nodes_and_handles_that_were_never_given_out_are_refused() {
    let mut client = Client::new();
    let (entry, open) = client.create("file");
    for node in [0, 99, 1 << 63, u64::MAX] {
        assert_eq!(client.read(node, open.fh, 10), Err(libc::EBADF), "{node}");
        assert_eq!(client.request(Opcode::Lookup, node, &[b"x\0"]), Err(libc::EBADF), "{node}");
        let link = fuse::LinkIn { oldnodeid: node };
        assert_eq!(client.request(Opcode::Link, 1, &[link.as_slice(), b"l\0"]), Err(libc::EBADF));
    }
    for handle in [open.fh + 1, 1 << 63, u64::MAX] {
        assert_eq!(client.read(entry.nodeid, handle, 10), Err(libc::EBADF), "{handle}");
    }
}

#[test]
fn malformed_messages_are_answered_or_dropped() {
    let mut client = Client::new();
    let lookup = message(Opcode::Lookup as u32, 1, &[b"x\0"]);
    assert_eq!(client.send(&lookup[..39], ROOM).1, 0, "no header");
    assert_eq!(client.send(&lookup, 15).1, 0, "no room for a reply");
    assert_eq!(client.send(&lookup, 16).1, OUT_HEADER, "room for an error only");

    for len in [0u32, 39, 41, 4096, u32::MAX] {
        let mut lying = lookup.clone();
        lying[..4].copy_from_slice(&len.to_le_bytes());
        let (bytes, written) = client.send(&lying, ROOM);
        assert_eq!(written, OUT_HEADER, "length {len}");
        assert_ne!(read::<fuse::OutHeader>(&bytes).error, 0, "length {len}");
    }
    let (bytes, _) = client.send(&message(9999, 1, &[]), ROOM);
    assert_eq!(read::<fuse::OutHeader>(&bytes).error, -libc::ENOSYS);
    // Each operation with nothing behind its header.
    for opcode in (1..=52).filter(|opcode| *opcode != Opcode::Init as u32) {
        client.send(&message(opcode, 1, &[]), ROOM);
    }
}

#[test]
fn a_request_of_another_client_starts_anew() {
    let mut client = Client::new();
    let (entry, open) = client.create("file");
    /// `FUSE_SUBMOUNTS`, which every Linux has since 5.10.
    const SUBMOUNTS: u32 = 1 << 27;
    let old = fuse::InitInCompat { major: 7, minor: 41, ..Default::default() };
    assert_eq!(client.request(Opcode::Init, 0, &[old.as_slice()]), Err(libc::EPROTO));
    let init = fuse::InitInCompat { flags: SUBMOUNTS, ..old };
    client.request(Opcode::Init, 0, &[init.as_slice()]).unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, 10), Err(libc::EBADF));
}

#[test]
fn what_is_served_read_only_is_read_and_refuses_to_be_changed() {
    let mut client = Client::with(Access::ReadOnly);
    std::fs::write(client.directory.path().join("file"), "content").unwrap();
    let entry: fuse::EntryOut = read(&client.request(Opcode::Lookup, 1, &[b"file\0"]).unwrap());
    let open = |flags: i32| fuse::OpenIn { flags: flags as u32, ..Default::default() };
    let reply = client.request(Opcode::Open, entry.nodeid, &[open(libc::O_NOATIME).as_slice()]).unwrap();
    let opened: fuse::OpenOut = read(&reply);
    assert_eq!(client.read(entry.nodeid, opened.fh, 100).unwrap(), b"content");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        let opened = client.request(Opcode::Open, entry.nodeid, &[open(flags).as_slice()]);
        assert_eq!(opened, Err(libc::EROFS), "{flags:#o}");
    }
    assert_eq!(client.write(entry.nodeid, opened.fh, b"x"), Err(libc::EROFS));
    assert_eq!(client.mknod("pipe", libc::S_IFIFO | 0o666), Err(libc::EROFS));
    assert_eq!(client.request(Opcode::Unlink, 1, &[b"file\0"]), Err(libc::EROFS));
    assert_eq!(std::fs::read_to_string(client.directory.path().join("file")).unwrap(), "content");
}
