//! What programs lean on in a file system, each as a small check.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom as Seekable,
    XattrFlags,
};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use crate::Outcome;

/// What goes wrong inside a check; the check's name is added later.
type Failure = Box<dyn std::error::Error>;

/// A check of one promise, in a new directory of its own.
type Check = (&'static str, fn(&Path) -> Result<(), Failure>);

const CHECKS: [Check; 25] = [
    ("a file is read as it was written", written_and_read),
    ("rename replaces a file", rename_replaces),
    ("rename with NOREPLACE and EXCHANGE", rename_flags),
    ("rename moves a directory with its content", rename_directory),
    ("an unlinked file lives while it is open", unlinked_while_open),
    ("hard links are one file", hard_links),
    ("symbolic links", symbolic_links),
    ("exclusive creation", exclusive_creation),
    ("appending", appending),
    ("truncating and growing", truncating),
    ("shared memory maps", shared_map),
    ("private memory maps", private_map),
    ("record locks between processes", record_locks),
    ("flock between open files", whole_file_locks),
    ("extended attributes", extended_attributes),
    ("a directory of 3000 files", large_directory),
    ("O_TMPFILE and linking it", temporary_file),
    ("sparse files", sparse_file),
    ("fallocate and hole punching", allocation),
    ("modes, owners and times", attributes),
    ("names of odd bytes and of 255", names),
    ("a directory that is not empty stays", directory_not_empty),
    ("fifos and sockets", special_files),
    ("offsets beyond 4 GiB", large_offsets),
    ("copies within the kernel", kernel_copies),
];

/// Makes a file, with the mode in the system call that makes it.
pub fn make(arguments: &[String]) -> Outcome {
    let [path, mode] = arguments else { return Err("a file and a mode are wanted".into()) };
    let mode = u32::from_str_radix(mode, 8).map_err(|e| format!("{mode}: {e}"))?;
    rustix::process::umask(Mode::empty());
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    rustix::fs::open(path, flags, Mode::from_raw_mode(mode)).map(drop).map_err(|e| format!("{path}: {e}"))
}

/// Opens all files of a directory at the same time, as far as that goes, and says how far it went.
pub fn hold(arguments: &[String]) -> Outcome {
    let top = arguments.first().ok_or("a directory is missing")?;
    let many = rustix::process::Rlimit { current: Some(1024), maximum: Some(1024) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, many).map_err(|e| e.to_string())?;
    let mut held = vec![];
    let mut why = String::new();
    for entry in fs::read_dir(top).map_err(|e| format!("{top}: {e}"))? {
        match entry.and_then(|entry| File::open(entry.path())) {
            Ok(file) => held.push(file),
            Err(error) => {
                why = format!(", then: {error}");
                break;
            }
        }
    }
    println!("{} held{why}", held.len());
    Ok(())
}

/// Runs every check below a directory, each in a directory of its own that is removed afterwards.
pub fn check(arguments: &[String]) -> Outcome {
    let top = Path::new(arguments.first().ok_or("a directory is missing")?);
    let mut failed = vec![];
    for (name, check) in CHECKS {
        let directory = top.join("check");
        let result = fs::create_dir(&directory).map_err(Failure::from).and_then(|()| check(&directory));
        let result = result.and_then(|()| fs::remove_dir_all(&directory).map_err(Failure::from));
        match result {
            Ok(()) => println!("ok {name}"),
            Err(why) => {
                println!("FAILED {name}: {why}");
                failed.push(name);
                let _ = fs::remove_dir_all(&directory);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("these failed: {}", failed.join("; "))) }
}

/// Fails the check unless the condition holds.
macro_rules! ensure {
    ($condition:expr) => {
        if !$condition {
            return Err(concat!("not so: ", stringify!($condition)).into());
        }
    };
}

/// Fails the check unless the operation failed with this error.
macro_rules! refuses {
    ($operation:expr, $errno:ident) => {
        match $operation.map_err(|e| std::io::Error::from(e).raw_os_error()) {
            Err(Some(libc::$errno)) => {}
            other => {
                return Err(
                    format!("{} gave {other:?}, not {}", stringify!($operation), stringify!($errno)).into()
                );
            }
        }
    };
}

fn both(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn written_and_read(at: &Path) -> Result<(), Failure> {
    let data = sandbox_tests::pattern::sequence(3 << 20);
    let path = at.join("a");
    let mut file = File::create(&path)?;
    file.write_all(&data)?;
    file.sync_all()?;
    ensure!(fs::read(&path)? == data);
    ensure!(fs::metadata(&path)?.len() == data.len() as u64);
    Ok(())
}

fn rename_replaces(at: &Path) -> Result<(), Failure> {
    let (old, new) = (at.join("old"), at.join("new"));
    fs::write(&old, "old")?;
    fs::write(&new, "new")?;
    let mut open = File::open(&new)?;
    fs::rename(&old, &new)?;
    ensure!(!old.exists());
    ensure!(fs::read_to_string(&new)? == "old");
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    ensure!(text == "new");
    Ok(())
}

fn rename_flags(at: &Path) -> Result<(), Failure> {
    let (one, two) = (at.join("one"), at.join("two"));
    fs::write(&one, "1")?;
    fs::write(&two, "2")?;
    refuses!(rustix::fs::renameat_with(CWD, &one, CWD, &two, RenameFlags::NOREPLACE), EEXIST);
    rustix::fs::renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE)?;
    ensure!(fs::read_to_string(&one)? == "2");
    ensure!(fs::read_to_string(&two)? == "1");
    Ok(())
}

fn rename_directory(at: &Path) -> Result<(), Failure> {
    fs::create_dir_all(at.join("a/deep"))?;
    fs::write(at.join("a/deep/file"), "x")?;
    let open = File::open(at.join("a/deep/file"))?;
    fs::create_dir(at.join("b"))?;
    fs::rename(at.join("a/deep"), at.join("b/deeper"))?;
    ensure!(fs::read_to_string(at.join("b/deeper/file"))? == "x");
    ensure!(open.metadata()?.ino() == fs::metadata(at.join("b/deeper/file"))?.ino());
    ensure!(!at.join("a/deep").exists());
    Ok(())
}

fn unlinked_while_open(at: &Path) -> Result<(), Failure> {
    let path = at.join("gone");
    let mut file = both(&path)?;
    file.write_all(b"before")?;
    fs::remove_file(&path)?;
    file.write_all(b" after")?;
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "before after");
    ensure!(file.metadata()?.nlink() == 0);
    ensure!(!path.exists());
    Ok(())
}

fn hard_links(at: &Path) -> Result<(), Failure> {
    let (one, two) = (at.join("one"), at.join("two"));
    fs::write(&one, "x")?;
    fs::hard_link(&one, &two)?;
    ensure!(fs::metadata(&one)?.ino() == fs::metadata(&two)?.ino());
    ensure!(fs::metadata(&two)?.nlink() == 2);
    fs::write(&two, "changed")?;
    ensure!(fs::read_to_string(&one)? == "changed");
    fs::remove_file(&one)?;
    ensure!(fs::metadata(&two)?.nlink() == 1);
    Ok(())
}

fn symbolic_links(at: &Path) -> Result<(), Failure> {
    fs::write(at.join("target"), "x")?;
    symlink("target", at.join("link"))?;
    symlink("loop", at.join("loop"))?;
    ensure!(fs::read_link(at.join("link"))? == Path::new("target"));
    ensure!(fs::read_to_string(at.join("link"))? == "x");
    refuses!(File::open(at.join("loop")), ELOOP);
    ensure!(fs::symlink_metadata(at.join("loop"))?.file_type().is_symlink());
    Ok(())
}

fn exclusive_creation(at: &Path) -> Result<(), Failure> {
    File::create_new(at.join("a"))?;
    refuses!(File::create_new(at.join("a")), EEXIST);
    refuses!(fs::create_dir(at.join("a")), EEXIST);
    refuses!(File::open(at.join("a/b")), ENOTDIR);
    refuses!(File::open(at.join("b")), ENOENT);
    Ok(())
}

fn appending(at: &Path) -> Result<(), Failure> {
    let path = at.join("log");
    let append = || OpenOptions::new().append(true).create(true).open(&path);
    let (mut one, mut two) = (append()?, append()?);
    for _ in 0..3 {
        one.write_all(b"1")?;
        two.write_all(b"2")?;
    }
    ensure!(fs::read_to_string(&path)? == "121212");
    Ok(())
}

fn truncating(at: &Path) -> Result<(), Failure> {
    let path = at.join("a");
    fs::write(&path, "0123456789")?;
    let file = both(&path)?;
    file.set_len(4)?;
    file.set_len(6)?;
    ensure!(fs::read(&path)? == b"0123\0\0");
    OpenOptions::new().write(true).truncate(true).open(&path)?;
    ensure!(fs::metadata(&path)?.len() == 0);
    Ok(())
}

fn shared_map(at: &Path) -> Result<(), Failure> {
    let file = both(&at.join("a"))?;
    file.set_len(MAP_BYTES as u64)?;
    let map = Map::new(&file, MapFlags::SHARED)?;
    map.put(5000, b'm');
    map.sync()?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000)?;
    ensure!(byte == *b"m");
    file.write_all_at(b"w", 9000)?;
    ensure!(map.get(9000) == b'w');
    drop(map);
    ensure!(fs::read(at.join("a"))?[5000] == b'm');
    Ok(())
}

fn private_map(at: &Path) -> Result<(), Failure> {
    let file = both(&at.join("a"))?;
    file.set_len(MAP_BYTES as u64)?;
    file.write_all_at(b"f", 100)?;
    let map = Map::new(&file, MapFlags::PRIVATE)?;
    ensure!(map.get(100) == b'f');
    map.put(100, b'p');
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100)?;
    ensure!(byte == *b"f");
    Ok(())
}

const MAP_BYTES: usize = 16 << 10;

/// A mapping of the first [`MAP_BYTES`] bytes of a file.
struct Map(*mut u8);

impl Map {
    fn new(file: &File, flags: MapFlags) -> Result<Self, Failure> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so that nothing else is mapped there.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), MAP_BYTES, protection, flags, file, 0) }?;
        Ok(Self(address.cast()))
    }

    fn put(&self, at: usize, value: u8) {
        assert!(at < MAP_BYTES);
        // SAFETY: inside the mapping, which lives as long as this does.
        unsafe { self.0.add(at).write_volatile(value) }
    }

    fn get(&self, at: usize) -> u8 {
        assert!(at < MAP_BYTES);
        // SAFETY: inside the mapping, which lives as long as this does.
        unsafe { self.0.add(at).read_volatile() }
    }

    fn sync(&self) -> Result<(), Failure> {
        // SAFETY: this is the whole of the mapping.
        Ok(unsafe { rustix::mm::msync(self.0.cast(), MAP_BYTES, MsyncFlags::SYNC) }?)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: this is the whole of the mapping, and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), MAP_BYTES) };
    }
}

/// A second process tries to take the lock: this program again, as `flock` has no record locks.
fn record_locks(at: &Path) -> Result<(), Failure> {
    let path = at.join("lock");
    let file = both(&path)?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // SAFETY: the child makes system calls on what it has open, and ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mine = both(&path).and_then(|f| {
            rustix::fs::fcntl_lock(&f, FlockOperation::NonBlockingLockExclusive).map_err(Into::into)
        });
        let busy = mine.is_err_and(|e| matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)));
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(if busy { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: the status outlives the call.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(status == 0);
    rustix::fs::fcntl_lock(&file, FlockOperation::Unlock)?;
    Ok(())
}

fn whole_file_locks(at: &Path) -> Result<(), Failure> {
    let (one, two) = (both(&at.join("lock"))?, both(&at.join("lock"))?);
    rustix::fs::flock(&one, FlockOperation::NonBlockingLockExclusive)?;
    refuses!(rustix::fs::flock(&two, FlockOperation::NonBlockingLockShared), EAGAIN);
    rustix::fs::flock(&one, FlockOperation::Unlock)?;
    rustix::fs::flock(&two, FlockOperation::NonBlockingLockShared)?;
    Ok(())
}

fn extended_attributes(at: &Path) -> Result<(), Failure> {
    let path = at.join("a");
    fs::write(&path, "x")?;
    rustix::fs::setxattr(&path, "user.name", b"value", XattrFlags::CREATE)?;
    refuses!(rustix::fs::setxattr(&path, "user.name", b"value", XattrFlags::CREATE), EEXIST);
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(&path, "user.name", &mut value)?;
    ensure!(value[..length] == *b"value");
    let mut list = [0; 256];
    let length = rustix::fs::listxattr(&path, &mut list)?;
    ensure!(list[..length].split(|b| *b == 0).any(|name| name == b"user.name"));
    rustix::fs::removexattr(&path, "user.name")?;
    refuses!(rustix::fs::getxattr(&path, "user.name", &mut value), ENODATA);
    Ok(())
}

fn large_directory(at: &Path) -> Result<(), Failure> {
    const FILES: usize = 3000;
    for i in 0..FILES {
        File::create_new(at.join(format!("a-name-of-some-length-{i}")))?;
    }
    let listed: Vec<_> = fs::read_dir(at)?.collect::<Result<_, _>>()?;
    let names: BTreeSet<_> = listed.iter().map(fs::DirEntry::file_name).collect();
    ensure!(listed.len() == FILES);
    ensure!(names.len() == FILES);
    Ok(())
}

fn temporary_file(at: &Path) -> Result<(), Failure> {
    let file = rustix::fs::open(at, OFlags::TMPFILE | OFlags::RDWR, Mode::from_raw_mode(0o640))?;
    let mut file = File::from(file);
    file.write_all(b"hidden")?;
    ensure!(fs::read_dir(at)?.count() == 0);
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, name.as_str(), CWD, at.join("shown"), AtFlags::SYMLINK_FOLLOW)?;
    ensure!(fs::read_to_string(at.join("shown"))? == "hidden");
    Ok(())
}

fn sparse_file(at: &Path) -> Result<(), Failure> {
    const END: u64 = 1 << 30;
    let file = both(&at.join("sparse"))?;
    file.write_all_at(b"end", END)?;
    file.sync_all()?;
    ensure!(file.metadata()?.len() == END + 3);
    ensure!(file.metadata()?.blocks() < 2048);
    ensure!(rustix::fs::seek(&file, Seekable::Data(0))? > END / 2);
    ensure!(rustix::fs::seek(&file, Seekable::Hole(0))? == 0);
    let mut middle = [1; 16];
    file.read_exact_at(&mut middle, END / 2)?;
    ensure!(middle == [0; 16]);
    Ok(())
}

fn allocation(at: &Path) -> Result<(), Failure> {
    let file = both(&at.join("a"))?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
    ensure!(file.metadata()?.len() == 1 << 20);
    file.write_all_at(&[7; 64 << 10], 0)?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 4096, 4096)?;
    let mut byte = [1];
    file.read_exact_at(&mut byte, 5000)?;
    ensure!(byte == [0]);
    file.read_exact_at(&mut byte, 9000)?;
    ensure!(byte == [7]);
    Ok(())
}

fn attributes(at: &Path) -> Result<(), Failure> {
    let path = at.join("a");
    fs::write(&path, "x")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751))?;
    ensure!(fs::metadata(&path)?.mode() & 0o7777 == 0o4751);
    std::os::unix::fs::chown(&path, Some(1000), Some(2000))?;
    ensure!((fs::metadata(&path)?.uid(), fs::metadata(&path)?.gid()) == (1000, 2000));
    let time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty())?;
    ensure!(fs::metadata(&path)?.mtime() == 1_000_000_000);
    ensure!(fs::metadata(&path)?.mtime_nsec() == 123_456_789);
    Ok(())
}

fn names(at: &Path) -> Result<(), Failure> {
    use std::os::unix::ffi::OsStrExt;
    for name in [&b"\xff\xfe"[..], b"new\nline", b" ", b"...", &[b'n'; 255]] {
        let name = std::ffi::OsStr::from_bytes(name);
        File::create_new(at.join(name))?;
        ensure!(fs::read_dir(at)?.any(|entry| entry.is_ok_and(|entry| entry.file_name() == name)));
    }
    refuses!(File::create_new(at.join("n".repeat(256))), ENAMETOOLONG);
    Ok(())
}

fn directory_not_empty(at: &Path) -> Result<(), Failure> {
    fs::create_dir_all(at.join("a/b"))?;
    refuses!(fs::remove_dir(at.join("a")), ENOTEMPTY);
    refuses!(fs::remove_file(at.join("a")), EISDIR);
    fs::remove_dir(at.join("a/b"))?;
    fs::remove_dir(at.join("a"))?;
    Ok(())
}

fn special_files(at: &Path) -> Result<(), Failure> {
    let fifo = at.join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    let mut through = OpenOptions::new().read(true).write(true).open(&fifo)?;
    through.write_all(b"x")?;
    let mut byte = [0];
    through.read_exact(&mut byte)?;
    ensure!(byte == *b"x");
    let listener = UnixListener::bind(at.join("socket"))?;
    let _client = UnixStream::connect(at.join("socket"))?;
    listener.accept()?;
    Ok(())
}

fn large_offsets(at: &Path) -> Result<(), Failure> {
    let mut file = both(&at.join("large"))?;
    file.seek(SeekFrom::Start(5 << 30))?;
    file.write_all(b"far")?;
    let mut back = [0; 3];
    file.read_exact_at(&mut back, 5 << 30)?;
    ensure!(back == *b"far");
    ensure!(file.metadata()?.len() == (5 << 30) + 3);
    Ok(())
}

fn kernel_copies(at: &Path) -> Result<(), Failure> {
    let data = sandbox_tests::pattern::sequence(300_000);
    fs::write(at.join("from"), &data)?;
    // `fs::copy` is copy_file_range where the file system has it.
    ensure!(fs::copy(at.join("from"), at.join("to"))? == data.len() as u64);
    ensure!(fs::read(at.join("to"))? == data);
    Ok(())
}
