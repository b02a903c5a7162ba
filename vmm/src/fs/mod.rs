//! The virtio-fs device: the host directories that the guest sees.
//!
//! Virtio-fs (virtio 1.2, 5.11) carries FUSE messages in virtqueues: the guest's kernel is the FUSE client,
//! and this device is the server. Queue 0 is for messages that must not wait behind others (`FORGET`,
//! `INTERRUPT`), queue 1 for everything else. A chain's readable part is a request (a header of 40 bytes, then
//! the operation's own), its writable part takes the reply (a header of 16 bytes, then the result). File data
//! goes between the host's file and the guest's buffers without a copy in between.
//!
//! The server is virtiofsd's, used as a library, in this process. What the guest may ask of it is narrowed
//! in [`guarded`]; what it can reach is the jail's business: the share is a tree of bind mounts that is all
//! there is, and a read-only entry is a read-only mount of the host.
//!
//! # What the guest caches
//!
//! The guest keeps file data, directory listings, names and attributes, and asks again for names and
//! attributes after [`VALID_FOR`]: so a change that the host makes in a volume is seen within that time (the
//! kernel drops a file's cached data when its time or size has changed). Writes go through at once: with
//! write-back the guest's kernel would be the authority for sizes and times, and would not see the host's
//! changes at all; and what a program has written would be lost when its machine is killed.

pub mod blocks;
mod guarded;
#[cfg(test)]
mod tests;
mod tmpfile;

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, OpenOptions};
use virtiofsd::fuse::{CreateIn, EntryOut, InHeader, Opcode, OpenOut, OutHeader};
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use virtiofsd::server::Server;

use crate::virtio::chain::{self, Indirect, Limits};
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice, rate};
use blocks::Blocks;
use guarded::Guarded;
use tmpfile::Tmpfiles;

/// How long the guest takes a name and attributes for valid without asking.
const VALID_FOR: Duration = Duration::from_secs(1);

/// The size of a queue: a request of 1 MiB, the largest there is, takes 256 buffers and its headers.
pub const QUEUE_SIZE: u16 = 1024;

/// The descriptors that a share is given where the host allows it. Distributions' hard limits start at 4096, which
/// one directory of a guest can use up.
const WANTED_DESCRIPTORS: u64 = 1_000_000;

/// Descriptors that the guest's named files leave for its files without a name, for its connections, and for the
/// rest of the process; at most half of all.
const RESERVED_DESCRIPTORS: u64 = 4096;

/// The length of the tag field in the configuration space.
const TAG_BYTES: usize = 36;

/// Queues for requests, besides the one for urgent messages.
const REQUEST_QUEUES: u32 = 1;

/// The length of the configuration space.
const CONFIG_BYTES: usize = TAG_BYTES + size_of::<u32>();

/// Why the file server could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tag does not fit its field.
    #[error("virtio-fs tag {0:?} is empty or longer than {TAG_BYTES} bytes")]
    Tag(String),
    /// The limit of open files could not be read or raised.
    #[error("raising the limit of open files for the file server: {0}")]
    DescriptorLimit(#[source] io::Error),
    /// The directory of the process's own descriptors could not be kept.
    #[error("keeping /proc/self/fd for the file server: {0}")]
    Descriptors(#[source] io::Error),
    /// The server refused its root.
    #[error("opening the share {path:?} for the file server: {error}")]
    Root {
        /// The share's root.
        path: String,
        /// Why.
        error: io::Error,
    },
}

/// What the guest may do to files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read them.
    ReadOnly,
    /// Change them, where an entry's own mount does not forbid it.
    ReadWrite,
}

/// The virtio-fs device.
pub struct Fs {
    server: Server<Guarded>,
    files: Guarded,
    config: [u8; CONFIG_BYTES],
    thread: Thread,
    requests: u64,
}

/// Whether the thread that serves has been given its own working directory and umask.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thread {
    Shared,
    Own,
}

impl Fs {
    /// Serves the directory at `root` under `tag`. What is served read-only refuses every change by itself.
    ///
    /// `descriptors` is an open `/proc/self/fd`, which a jailed process no longer has by name; `blocks` are shown in
    /// the share besides.
    pub fn new(
        tag: &str,
        root: &Path,
        access: Access,
        descriptors: File,
        blocks: Blocks,
    ) -> Result<Self, Error> {
        let limit = raise_descriptor_limit()?;
        let guest_files = limit - RESERVED_DESCRIPTORS.min(limit / 2);
        let tmpfiles = Tmpfiles::new(descriptors.try_clone().map_err(Error::Descriptors)?);
        let path = root.to_string_lossy().into_owned();
        let passthrough =
            PassthroughFs::new(passthrough_config(path.clone(), access, descriptors, guest_files))
                .map_err(|error| Error::Root { path, error })?;
        let files = Guarded::new(passthrough, tmpfiles, access, blocks);
        Ok(Self {
            server: Server::new(files.clone()),
            files,
            config: config_space(tag)?,
            thread: Thread::Shared,
            requests: 0,
        })
    }

    /// Gives the serving thread a working directory and a umask of its own: the server changes both on the
    /// way, and the rest of the process must not see that.
    fn own_thread(&mut self) {
        if self.thread == Thread::Own {
            return;
        }
        // SAFETY: neither call touches memory. Unsharing the file system attributes of a thread needs no
        // privilege, and where a filter of the host refuses it the attributes stay shared, which only matters
        // to code that depends on the working directory; there is none.
        unsafe {
            libc::unshare(libc::CLONE_FS);
            libc::umask(0);
        }
        self.thread = Thread::Own;
    }

    /// Answers one request; returns the length of the reply.
    fn serve(
        &self,
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
        limits: &Limits,
    ) -> Result<u32, BrokenRing> {
        let Ok(reader) = Reader::new(memory, chain.clone()) else { return Ok(0) };
        let Ok(writer) = Writer::new(memory, chain.clone()) else { return Ok(0) };
        // Buffers that are the same memory over and over make room for a reply of any size, and the server
        // allocates by that.
        let bytes = reader.available_bytes().saturating_add(writer.available_bytes());
        if bytes as u64 > limits.max_bytes {
            let reason = format!("a request with its reply of {bytes} bytes");
            return Err(BrokenRing { queue: limits.queue, reason });
        }
        rate::spend_bytes(reader.available_bytes() as u64);
        Ok(self.answer(memory, chain, reader, writer))
    }

    /// Answers the request in buffers of acceptable size; returns the length of the reply.
    fn answer(
        &self,
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
        reader: Reader<'_>,
        writer: Writer<'_>,
    ) -> u32 {
        let Ok(request) = reader.clone().read_obj::<InHeader>() else { return 0 };
        if wants_reply(request.opcode) && writer.available_bytes() < size_of::<OutHeader>() {
            return 0;
        }
        if request.opcode == Opcode::TmpFile as u32 {
            return self.tmpfile(&request, reader, writer).unwrap_or(0);
        }
        match self.server.handle_message(reader, writer, None::<&mut NoBackChannel>) {
            Ok(length) => u32::try_from(length).unwrap_or(0),
            Err(error) => {
                tracing::debug!(opcode = request.opcode, %error, "malformed file request");
                refuse(memory, chain, request.unique)
            }
        }
    }

    /// Answers `TMPFILE`, which the server does not know. It is like `CREATE`, with a name that means nothing.
    fn tmpfile(&self, request: &InHeader, mut reader: Reader<'_>, mut writer: Writer<'_>) -> io::Result<u32> {
        reader.read_obj::<InHeader>()?;
        let asked = reader.read_obj::<CreateIn>()?;
        let made = self.files.tmpfile(Context::from(*request), request.nodeid, asked.mode, asked.umask);
        match made {
            Ok((entry, handle)) => {
                let entry = EntryOut::from(entry);
                let open =
                    OpenOut { fh: handle, open_flags: OpenOptions::KEEP_CACHE.bits(), ..OpenOut::default() };
                let len = (size_of::<OutHeader>() + size_of::<EntryOut>() + size_of::<OpenOut>()) as u32;
                writer.write_obj(OutHeader { len, error: 0, unique: request.unique })?;
                writer.write_obj(entry)?;
                writer.write_obj(open)?;
                Ok(len)
            }
            Err(error) => {
                let len = size_of::<OutHeader>() as u32;
                let error = -error.raw_os_error().unwrap_or(libc::EIO);
                writer.write_obj(OutHeader { len, error, unique: request.unique })?;
                Ok(len)
            }
        }
    }

    /// Serves a queue until it is empty.
    fn drain(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        limits: &Limits,
    ) -> Result<Signals, BrokenRing> {
        let mut signals = Signals::NONE;
        loop {
            while let Some(request) = chain::next_raw(queue, memory, limits)? {
                let head = request.head_index();
                let length = self.serve(memory, request, limits)?;
                chain::complete(queue, memory, limits, head, length)?;
                self.requests = self.requests.wrapping_add(1);
            }
            if !chain::enable_notification(queue, memory, limits)? {
                break;
            }
        }
        if chain::wants_signal(queue, memory, limits)? {
            signals.add(limits.queue);
        }
        Ok(signals)
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &str {
        "fs"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(index));
            *byte = at.and_then(|at| self.config.get(at)).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        // The next driver's INIT wipes what the last one had open.
    }

    fn notified(
        &mut self,
        queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.own_thread();
        match queues.get_mut(queue) {
            Some(ring) => self.drain(ring, memory, &limits(queue)),
            None => Ok(Signals::NONE),
        }
    }

    fn statistics(&self) -> std::collections::BTreeMap<String, u64> {
        [("requests".to_owned(), self.requests)].into()
    }
}

/// What a queue accepts: the largest request, with its headers.
fn limits(queue: usize) -> Limits {
    const REQUEST_BYTES_MAX: u64 = 2 << 20;
    let max_buffers = usize::from(QUEUE_SIZE);
    Limits { queue, max_bytes: REQUEST_BYTES_MAX, max_buffers, indirect: Indirect::Allowed }
}

/// The server's way back to a vhost-user front end, which there is none of.
struct NoBackChannel;

/// Whether the client waits for a reply to a request.
fn wants_reply(opcode: u32) -> bool {
    const SILENT: [u32; 4] =
        [Opcode::Forget as u32, Opcode::BatchForget as u32, Opcode::Interrupt as u32, Opcode::Destroy as u32];
    !SILENT.contains(&opcode)
}

/// Answers a request that the server could not read.
fn refuse(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>, unique: u64) -> u32 {
    let length = size_of::<OutHeader>() as u32;
    let reply = OutHeader { len: length, error: -libc::EINVAL, unique };
    match Writer::new(memory, chain).map(|mut writer| writer.write_obj(reply)) {
        Ok(Ok(())) => length,
        _ => 0,
    }
}

/// How the passthrough is to behave; see the module's primer for what the guest may cache.
fn passthrough_config(root_dir: String, access: Access, descriptors: File, guest_fd_limit: u64) -> Config {
    Config {
        entry_timeout: VALID_FOR,
        attr_timeout: VALID_FOR,
        cache_policy: CachePolicy::Always,
        writeback: false,
        root_dir,
        xattr: true,
        proc_sfd_rawfd: Some(descriptors),
        // Entries may lie on several host file systems with equal inode numbers.
        announce_submounts: true,
        // Opening by handle would need CAP_DAC_READ_SEARCH and could leave the jail.
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        // Set-user-id bits and file capabilities go when a file is written, as the host's kernel does it.
        killpriv_v2: true,
        // Linux leaves access lists out on announced mounts (6.12, `fuse_fill_super_submount`), and every entry
        // is one.
        posix_acl: NegotiationMode::Never,
        // Only a file's owner may ask for it, and on read-only mounts it means nothing.
        clean_noatime: access == Access::ReadOnly,
        guest_fd_limit,
        ..Config::default()
    }
}

/// The configuration space: the tag, then the number of request queues.
fn config_space(tag: &str) -> Result<[u8; CONFIG_BYTES], Error> {
    if tag.is_empty() || tag.len() > TAG_BYTES {
        return Err(Error::Tag(tag.to_owned()));
    }
    let mut config = [0; CONFIG_BYTES];
    for (to, from) in config.iter_mut().zip(tag.bytes()) {
        *to = from;
    }
    for (to, from) in config.iter_mut().skip(TAG_BYTES).zip(REQUEST_QUEUES.to_le_bytes()) {
        *to = from;
    }
    Ok(config)
}

/// Every inode that the guest knows holds a descriptor: allows [`WANTED_DESCRIPTORS`], or as many as the host
/// does; returns that number.
fn raise_descriptor_limit() -> Result<u64, Error> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let set = |limit| {
        setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) }).map(|()| limit)
    };
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(WANTED_DESCRIPTORS);
    if hard < WANTED_DESCRIPTORS {
        // Raising the hard limit takes CAP_SYS_RESOURCE, and fs.nr_open may be lower than what is wanted.
        if let Ok(limit) = set(WANTED_DESCRIPTORS) {
            return Ok(limit);
        }
    }
    set(hard).map_err(|error| Error::DescriptorLimit(error.into()))
}
