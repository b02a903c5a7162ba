//! A guest that owns its kernel, against the file server: raw FUSE messages, and a host that changes the share
//! meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::XattrFlags;
use sandbox_tests::bare::{self, DATA, Ring, Script, device};
use sandbox_tests::sandbox;
use sandbox_tests::vmm::Machine;
use sandbox_vmm_api::{ProcessIds, ShareEntry, VmConfig};

/// Operations (`enum fuse_opcode` of `linux/fuse.h`).
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const CREATE: u32 = 35;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUP_MAPPING: u32 = 48;
    pub const TMPFILE: u32 = 51;
}

const ROOT: u64 = 1;
/// What lookups of the test give out, in their order.
const WRITABLE: u64 = 2;
const FIXED: u64 = 3;
const LINK_TO_OUTSIDE: u64 = 4;
const FIXED_FILE: u64 = 5;

/// A node, or a handle, that was never given out.
const GUESS: u64 = 77;

/// What a message is answered with: an error, or what it is not.
enum Answer {
    Done,
    Error(i32),
    /// Some error.
    Refused,
    /// Nothing at all.
    Silence,
}

use Answer::{Done, Error, Refused, Silence};

/// A message, with what it tries.
struct Try {
    what: &'static str,
    message: Vec<u8>,
    answer: Answer,
}

/// A message, with its header.
pub fn message(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut message = ((40 + body.len()) as u32).to_le_bytes().to_vec();
    message.extend(opcode.to_le_bytes());
    message.extend(7u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    message.resize(40, 0);
    message.extend(body);
    message
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Structures that begin with a handle and an offset, and then say how much.
fn handle(handle: u64, bytes: usize) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.resize(bytes, 0);
    body[16] = 1;
    body
}

fn attempt(what: &'static str, answer: Answer, opcode: u32, node: u64, body: &[&[u8]]) -> Try {
    Try { what, message: message(opcode, node, body), answer }
}

/// A message whose first words are these instead.
fn damaged(what: &'static str, answer: Answer, start: &[u32], mut message: Vec<u8>) -> Try {
    message.splice(..4 * start.len(), words(start));
    Try { what, message, answer }
}

/// Names that are not the name of one entry.
fn bad_names() -> Vec<Try> {
    use opcode::*;
    const INVALID: i32 = libc::EINVAL;
    let device = words(&[libc::S_IFCHR | 0o666, 0x103, 0, 0]);
    let mut tries = vec![];
    for name in [&b"..\0"[..], b".\0", b"/\0", b"\0", b"/etc/passwd\0", b"a/../../outside\0"] {
        let two_names = [name, b"x\0"].concat();
        let other_way = [b"x\0", name].concat();
        let mode = words(&[0o755, 0]);
        for (what, opcode, body) in [
            ("looks up a path", LOOKUP, name.to_vec()),
            ("makes a directory elsewhere", MKDIR, [&mode, name].concat()),
            ("makes a file elsewhere", CREATE, [&words(&[0x42, 0o644, 0, 0]), name].concat()),
            ("makes a pipe elsewhere", MKNOD, [&words(&[libc::S_IFIFO | 0o666, 0, 0, 0]), name].concat()),
            ("makes a link elsewhere", SYMLINK, [name, b"/etc\0"].concat()),
            ("removes a file elsewhere", UNLINK, name.to_vec()),
            ("removes a directory elsewhere", RMDIR, name.to_vec()),
            ("moves something from elsewhere", RENAME, [&WRITABLE.to_le_bytes(), &two_names[..]].concat()),
            ("moves something elsewhere", RENAME, [&WRITABLE.to_le_bytes(), &other_way[..]].concat()),
            ("links something elsewhere", LINK, [&FIXED_FILE.to_le_bytes(), name].concat()),
        ] {
            tries.push(attempt(what, Error(INVALID), opcode, WRITABLE, &[&body]));
        }
    }
    tries.push(attempt("makes a device node", Error(libc::EPERM), MKNOD, WRITABLE, &[&device, b"null\0"]));
    tries.push(attempt("looks up a name without an end", Error(INVALID), LOOKUP, WRITABLE, &[b"name"]));
    tries
}

/// Nodes and handles that are not the guest's.
fn guesses() -> Vec<Try> {
    use opcode::*;
    let mut tries = vec![];
    for node in [0, GUESS, u64::MAX] {
        for (what, opcode, body) in [
            ("looks at a node that it guessed", GETATTR, vec![0; 16]),
            ("changes a node that it guessed", SETATTR, vec![0xff; 88]),
            ("opens a node that it guessed", OPEN, words(&[2, 0])),
            ("opens a directory that it guessed", OPENDIR, words(&[0, 0])),
            ("looks up in a node that it guessed", LOOKUP, b"passwd\0".to_vec()),
            ("links a node that it guessed", LINK, [&node.to_le_bytes()[..], b"x\0"].concat()),
        ] {
            tries.push(attempt(what, Refused, opcode, node, &[&body]));
        }
    }
    for (what, opcode, bytes) in [
        ("reads from a handle that it guessed", READ, 40),
        ("writes to a handle that it guessed", WRITE, 40),
        ("lists a handle that it guessed", READDIR, 40),
        ("closes a handle that it guessed", RELEASE, 24),
        ("allocates in a handle that it guessed", FALLOCATE, 32),
        ("copies between handles that it guessed", COPY_FILE_RANGE, 56),
    ] {
        for guess in [GUESS, u64::MAX] {
            tries.push(attempt(what, Refused, opcode, WRITABLE, &[&handle(guess, bytes)]));
        }
    }
    tries
}

/// Lengths, counts and operations that make no sense.
fn nonsense() -> Vec<Try> {
    use opcode::*;
    let name = || message(LOOKUP, WRITABLE, &[b"name\0"]);
    vec![
        damaged("says that it is longer than 4 GiB", Error(libc::ENOMEM), &[u32::MAX], name()),
        damaged("says that it is longer than it is", Error(libc::EINVAL), &[4096], name()),
        damaged("says that it is shorter than a header", Error(libc::EINVAL), &[10], name()),
        damaged("is an operation that nobody knows", Error(libc::ENOSYS), &[45, 4242], name()),
        damaged("is half a header", Silence, &[20], name()[..20].to_vec()),
        attempt("asks for a control of devices", Error(libc::ENOSYS), IOCTL, WRITABLE, &[&[0xff; 32]]),
        attempt(
            "asks for a window into host memory",
            Error(libc::ENOSYS),
            SETUP_MAPPING,
            WRITABLE,
            &[&[0; 40]],
        ),
        attempt(
            "forgets more than it can name",
            Error(libc::ENOMEM),
            BATCH_FORGET,
            0,
            &[&words(&[u32::MAX, 0])],
        ),
        attempt("forgets more than it names", Error(libc::EINVAL), BATCH_FORGET, 0, &[&words(&[100, 0])]),
        attempt("forgets the root", Silence, FORGET, ROOT, &[&u64::MAX.to_le_bytes()]),
        attempt(
            "lists with a buffer of 4 GiB",
            Refused,
            READDIR,
            WRITABLE,
            &[&[0; 16], &words(&[u32::MAX; 6])],
        ),
        attempt("reads 4 GiB", Refused, READ, WRITABLE, &[&[0; 16], &words(&[u32::MAX; 6])]),
        attempt(
            "sets an attribute of the host's",
            Error(libc::EOPNOTSUPP),
            SETXATTR,
            WRITABLE,
            &[&words(&[1, 0]), b"trusted.overlay.opaque\0y"],
        ),
    ]
}

/// Everything that writes, to what is shared read-only.
fn writes_to_what_is_read_only() -> Vec<Try> {
    use opcode::*;
    const READ_ONLY: i32 = libc::EROFS;
    let mut mode = words(&[1, 0]);
    mode.resize(88, 0);
    vec![
        attempt("makes a file", Error(READ_ONLY), CREATE, FIXED, &[&words(&[0x42, 0o644, 0, 0]), b"x\0"]),
        attempt("makes a directory", Error(READ_ONLY), MKDIR, FIXED, &[&words(&[0o755, 0]), b"x\0"]),
        attempt("makes a link", Error(READ_ONLY), SYMLINK, FIXED, &[b"x\0/etc\0"]),
        attempt("removes a file", Error(READ_ONLY), UNLINK, FIXED, &[b"file\0"]),
        attempt("moves a file out", Refused, RENAME, FIXED, &[&WRITABLE.to_le_bytes(), b"file\0file\0"]),
        attempt("links a file out", Refused, LINK, WRITABLE, &[&FIXED_FILE.to_le_bytes(), b"file\0"]),
        attempt("opens a file to write", Error(READ_ONLY), OPEN, FIXED_FILE, &[&words(&[2, 0])]),
        attempt("changes a mode", Error(READ_ONLY), SETATTR, FIXED_FILE, &[&mode]),
    ]
}

fn all_tries() -> Vec<Try> {
    use opcode::*;
    let init = [words(&[7, 41, 128 << 10, u32::MAX]), vec![0; 48]].concat();
    let mut tries = vec![
        attempt("begins", Done, INIT, 0, &[&init]),
        attempt("looks up what it may write", Done, LOOKUP, ROOT, &[b"writable\0"]),
        attempt("looks up what it may read", Done, LOOKUP, ROOT, &[b"fixed\0"]),
        attempt("looks up a link that leads outside", Done, LOOKUP, WRITABLE, &[b"link\0"]),
        attempt("looks up a file that it may read", Done, LOOKUP, FIXED, &[b"file\0"]),
        attempt("looks through a link that leads outside", Refused, LOOKUP, LINK_TO_OUTSIDE, &[b"canary\0"]),
        attempt("opens a link that leads outside", Refused, OPEN, LINK_TO_OUTSIDE, &[&words(&[2, 0])]),
        attempt("lists a link that leads outside", Refused, OPENDIR, LINK_TO_OUTSIDE, &[&words(&[0, 0])]),
    ];
    tries.extend(bad_names());
    tries.extend(guesses());
    tries.extend(nonsense());
    tries.extend(writes_to_what_is_read_only());
    tries.push(attempt("still looks up what it may read", Done, LOOKUP, FIXED, &[b"file\0"]));
    tries
}

/// A directory to write, one to read, and something outside of both.
fn share(config: &mut VmConfig, directory: &Path) {
    for name in ["writable", "fixed", "outside"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    fs::write(directory.join("outside/canary"), "unharmed").unwrap();
    fs::write(directory.join("fixed/file"), "unharmed").unwrap();
    symlink(directory.join("outside"), directory.join("writable/link")).unwrap();
    let entry = |name: &str, read_only| ShareEntry {
        path: name.into(),
        source: directory.join(name),
        read_only,
        id_map: None,
    };
    config.shares = vec![entry("writable", false), entry("fixed", true)];
}

/// Has a guest try all of it, and holds each answer against what it is to be. The machine runs on.
fn try_all(tries: &[Try], share: impl FnOnce(&mut VmConfig, &Path)) -> Machine {
    const REPLY: u32 = DATA + 0x2_0000;
    const UNTOUCHED: u32 = 0x1111_1111;
    let mut script = Script::new();
    script.select(device::FS);
    let mut rings = [Ring::new(0, 8), Ring::new(1, 8)];
    script.bring_up(0, &mut rings);
    let [_, ring] = &mut rings;
    for attempt in tries {
        script.fill(REPLY, UNTOUCHED, 4);
        script.ask(ring, &attempt.message, (REPLY, 4096));
        script.report(REPLY + 4);
    }
    script.say("done\n");
    script.halt();
    let mut machine = bare::start(script, share);
    machine.expect_running();
    bare::wait_for(&machine, "done\n");
    let report = bare::report(&machine);
    for (attempt, line) in tries.iter().zip(report.lines()) {
        let error = u32::from_str_radix(line, 16).unwrap();
        let what = attempt.what;
        let told = error.cast_signed().wrapping_neg();
        match attempt.answer {
            Done => assert_eq!(told, 0, "{what}"),
            Error(expected) => assert_eq!(told, expected, "{what}"),
            Refused => assert!((1..4096).contains(&told), "{what}: {told}"),
            Silence => assert_eq!(error, UNTOUCHED, "{what}"),
        }
    }
    machine
}

#[test]
fn names_with_slashes_guessed_handles_and_giant_lengths_are_refused() {
    let machine = try_all(&all_tries(), share);
    let directory = machine.plan.directory.path();
    for file in ["outside/canary", "fixed/file"] {
        assert_eq!(fs::read_to_string(directory.join(file)).unwrap(), "unharmed");
    }
    for (name, expected) in [("outside", vec!["canary"]), ("fixed", vec!["file"]), ("writable", vec!["link"])]
    {
        let left: Vec<_> =
            fs::read_dir(directory.join(name)).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, expected, "{name}");
    }
}

/// Everything that changes something, each where it would be done if it could.
fn changes() -> Vec<Try> {
    use opcode::*;
    let mut all = writes_to_what_is_read_only();
    let more = [
        ("makes a pipe", MKNOD, FIXED, [words(&[libc::S_IFIFO | 0o666, 0, 0, 0]), b"x\0".to_vec()].concat()),
        ("makes a file without a name", TMPFILE, FIXED, words(&[2, libc::S_IFREG | 0o600, 0, 0])),
        ("removes a directory", RMDIR, ROOT, b"fixed\0".to_vec()),
        ("links a file", LINK, FIXED, [&FIXED_FILE.to_le_bytes()[..], b"x\0"].concat()),
        ("empties a file by opening it", OPEN, FIXED_FILE, words(&[libc::O_TRUNC as u32, 0])),
        ("writes", WRITE, FIXED_FILE, handle(GUESS, 40)),
        ("allocates", FALLOCATE, FIXED_FILE, handle(GUESS, 32)),
        ("copies", COPY_FILE_RANGE, FIXED_FILE, handle(GUESS, 56)),
        ("sets an attribute", SETXATTR, FIXED_FILE, [words(&[1, 0]), b"user.x\0y".to_vec()].concat()),
        ("removes an attribute", REMOVEXATTR, FIXED_FILE, b"user.x\0".to_vec()),
    ];
    all.extend(more.map(|(what, opcode, node, body)| attempt(what, Refused, opcode, node, &[&body])));
    for attempt in &mut all {
        attempt.answer = Error(libc::EROFS);
    }
    all
}

#[test]
fn a_share_that_is_only_read_is_served_without_the_right_to_change_anything() {
    use opcode::*;
    let mut tries: Vec<_> = all_tries().into_iter().take(5).collect();
    tries.extend(changes());
    tries.push(attempt("opens a file to read it", Done, OPEN, FIXED_FILE, &[&words(&[0, 0])]));
    let ids = ProcessIds { vmm: 0x7800_0000 + std::process::id(), qemu: 0x7900_0000 + std::process::id() };
    let mut machine = try_all(&tries, |config, directory| {
        share(config, directory);
        for entry in &mut config.shares {
            entry.read_only = true;
        }
        // What is not the server's is for root alone, which it is not.
        fs::set_permissions(directory.join("fixed"), fs::Permissions::from_mode(0o700)).unwrap();
        config.ids = Some(ids);
    });
    let pid = machine.process().pid();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let id = ids.vmm;
        for field in ["Uid", "Gid"] {
            assert!(status.contains(&format!("{field}:\t{id}\t{id}\t{id}\t{id}\n")), "{status}");
        }
        assert!(status.contains("\nGroups:\t \n") || status.contains("\nGroups:\t\n"), "{status}");
    }
}

#[test]
fn a_path_that_the_host_changes_all_the_time_never_leads_outside() {
    let sandbox = sandbox("races");
    let at = |name: &str| sandbox.directory().join(name);
    for name in ["share", "outside", "share/inside", "share/kept"] {
        fs::create_dir(at(name)).unwrap();
    }
    fs::write(at("outside/file"), "outside\n").unwrap();
    fs::write(at("share/inside/file"), "inside\n").unwrap();
    symlink(at("outside"), at("share/link")).unwrap();
    fs::hard_link(at("share/inside/file"), at("share/kept/file")).unwrap();
    let source = at("share");
    let sandbox = sandbox.mount("/mnt", "bind", &source, &["rbind", "rw"]);
    let stop = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        // `x` is a directory, a link to the one outside, and nothing, in turn; the guest renames and links in it.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for from in ["inside", "link"] {
                    // The guest may have moved something in the way, or away.
                    let _ = fs::rename(source.join(from), source.join("x"));
                    std::thread::yield_now();
                    let _ = fs::rename(source.join("x"), source.join(from));
                }
            }
        });
        let script = "i=0; while [ $i -lt 100 ]; do cat /mnt/x/file; echo wrong >/mnt/x/new; ln /mnt/x/file /mnt/x/hard; \
                      mv /mnt/x/new /mnt/x/file; mv /mnt/kept/file /mnt/x/moved; ln -s /etc /mnt/x/s; \
                      ls /mnt/x/s/; i=$((i+1)); done 2>/dev/null | sort | uniq";
        let outcome = sandbox.run(["sh", "-c", script]);
        stop.store(true, Ordering::Relaxed);
        outcome
    });
    let outcome = outcome.expect_code(0);
    assert!(!outcome.out().contains("outside"), "{outcome}");
    assert_eq!(fs::read_to_string(sandbox.directory().join("outside/file")).unwrap(), "outside\n");
    let left: Vec<_> = fs::read_dir(sandbox.directory().join("outside")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A capability to do everything, as it stands in a file's attribute (`VFS_CAP_REVISION_2`, effective).
const FILE_CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn set_ids_and_file_capabilities_go_when_somebody_else_writes_a_file() {
    let sandbox = sandbox("set-ids").config(|config| {
        config["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000});
    });
    let volume = sandbox.directory().join("volume");
    fs::create_dir(&volume).unwrap();
    let at = |name: &str| volume.join(name);
    for name in ["appended", "cut", "written"] {
        fs::write(at(name), "as it was\n").unwrap();
        rustix::fs::setxattr(at(name), "security.capability", &FILE_CAPABILITY, XattrFlags::empty()).unwrap();
        // A change of the mode would be no change of the capability, so it may come after.
        fs::set_permissions(at(name), fs::Permissions::from_mode(0o6777)).unwrap();
    }
    fs::create_dir(at("of-a-group")).unwrap();
    chown(at("of-a-group"), None, Some(5000)).unwrap();
    fs::set_permissions(at("of-a-group"), fs::Permissions::from_mode(0o2777)).unwrap();
    let sandbox = sandbox.mount("/mnt", "bind", &volume, &["rbind", "rw"]);
    let script = "cd /mnt && echo more >>appended && echo less >cut && \
                  printf x | dd of=written conv=notrunc 2>/dev/null && probe make of-a-group/mine 2755";
    sandbox.run(["sh", "-c", script]).expect_code(0);
    for name in ["appended", "cut", "written"] {
        let mode = fs::metadata(at(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o777, "{name}: {mode:o}");
        let capability = rustix::fs::getxattr(at(name), "security.capability", &mut [0; 64]);
        assert_eq!(capability, Err(rustix::io::Errno::NODATA), "{name}");
    }
    // Who is not of the group makes no program that runs as it.
    let made = fs::metadata(at("of-a-group/mine")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (1000, 5000, 0o755));
}

#[test]
fn a_root_file_system_full_of_links_leads_nowhere_on_the_host() {
    let sandbox = sandbox("links").flag("--persist");
    let outside = sandbox.directory().join("outside");
    fs::create_dir(&outside).unwrap();
    let volume = sandbox.directory().join("volume");
    fs::create_dir(&volume).unwrap();
    // Where the runtime mounts, and where it might write a name or an address.
    for name in ["proc", "dev", "sys", "etc", "mnt", "run"] {
        let place = sandbox.bundle.root(name);
        let _ = fs::remove_dir_all(&place);
        symlink(&outside, &place).unwrap();
    }
    let sandbox = sandbox.mount("/mnt/deep/volume", "bind", &volume, &["rbind", "rw"]);
    // Whether it can start at all is its own affair.
    let _ = sandbox.run(["sh", "-c", "echo x >/mnt/x; echo x >/etc/x; echo x >/run/x"]);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "something was made outside");
    assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
    for name in ["proc", "dev", "sys", "etc", "mnt", "run"] {
        assert!(sandbox.bundle.root(name).is_symlink(), "{name}");
    }
}
