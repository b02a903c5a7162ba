//! The jail, entered by child processes. Mounting takes root: without it these tests say that they are skipped.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};
use sandbox_vmm_api::ShareEntry;
use tempfile::TempDir;

use super::{Apart, Error, SHARE, VSOCK};

fn enter(shares: &[ShareEntry], vsock: Option<&Path>) -> Result<(), Error> {
    super::enter(shares, vsock, &Apart::make()?)
}

/// Runs `check` in a child of one thread and expects it to succeed.
fn in_child(check: impl FnOnce()) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: entering a jail takes root");
        return;
    }
    // SAFETY: the child runs the closure and exits, without returning into the test harness. The C library
    // makes its allocator usable in a forked child.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(outcome.is_err())) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made; the status lives on this stack.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child's checks failed, see above");
}

fn share(path: &str, source: impl AsRef<Path>, read_only: bool) -> ShareEntry {
    ShareEntry { path: path.into(), source: source.as_ref().to_owned(), read_only, id_map: None }
}

fn error_kind(result: std::io::Result<()>) -> ErrorKind {
    result.unwrap_err().kind()
}

/// A source with a file, and a directory to mount something on.
fn source() -> TempDir {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("file"), "content").unwrap();
    std::fs::create_dir(source.path().join("mount")).unwrap();
    source
}

#[test]
fn only_the_shares_and_the_sockets_are_left_of_the_host() {
    let source = source();
    in_child(|| {
        enter(&[share("box/rootfs", &source, false)], None).unwrap();
        let names = |path: &str| {
            let entries = std::fs::read_dir(path).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names("/"), ["share"]);
        assert_eq!(names("/share/box"), ["rootfs"]);
        assert_eq!(names("/.."), ["share"]);
        assert_eq!(std::fs::read_to_string("/share/box/rootfs/file").unwrap(), "content");
        assert!(!source.path().exists());
        std::fs::write("/share/box/rootfs/made", "inside").unwrap();
    });
    if rustix::process::geteuid().is_root() {
        assert_eq!(std::fs::read_to_string(source.path().join("made")).unwrap(), "inside");
    }
}

#[test]
fn a_read_only_entry_is_read_only_with_all_that_is_mounted_below_it() {
    let source = source();
    in_child(|| {
        // A mount namespace of the child's own, so that the mount goes with it.
        // SAFETY: the child has one thread.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let mounted = source.path().join("mount");
        rustix::mount::mount("tmpfs", &mounted, "tmpfs", MountFlags::empty(), None).unwrap();
        std::fs::write(mounted.join("file"), "mounted").unwrap();

        enter(&[share("ro", &source, true), share("rw", &source, false)], None).unwrap();
        assert_eq!(std::fs::read_to_string("/share/ro/mount/file").unwrap(), "mounted");
        for path in ["/share/ro/file", "/share/ro/new", "/share/ro/mount/file", "/share/ro/mount/new"] {
            assert_eq!(error_kind(std::fs::write(path, "x")), ErrorKind::ReadOnlyFilesystem, "{path}");
        }
        std::fs::write("/share/rw/mount/file", "x").unwrap();
    });
}

#[test]
fn nothing_can_be_made_beside_the_entries() {
    let source = source();
    in_child(|| {
        enter(&[share("a/b", &source, false)], None).unwrap();
        for path in ["/new", "/share/new", "/share/a/new"] {
            assert_eq!(error_kind(std::fs::write(path, "x")), ErrorKind::ReadOnlyFilesystem, "{path}");
        }
    });
}

#[test]
fn a_single_file_is_an_entry_too() {
    let source = source();
    let file = source.path().join("file");
    in_child(|| {
        enter(&[share("m/0", &file, true), share("m/1", &file, false)], None).unwrap();
        assert_eq!(std::fs::read_to_string("/share/m/0").unwrap(), "content");
        assert_eq!(error_kind(std::fs::write("/share/m/0", "x")), ErrorKind::ReadOnlyFilesystem);
        std::fs::write("/share/m/1", "changed").unwrap();
        assert_eq!(std::fs::read_to_string("/share/m/0").unwrap(), "changed");
    });
}

#[test]
fn a_device_node_in_an_entry_does_not_open() {
    let source = source();
    in_child(|| {
        let node = source.path().join("null");
        let (major, minor) = (1, 3);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &node,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::from_raw_mode(0o666),
            rustix::fs::makedev(major, minor),
        )
        .unwrap();
        std::fs::read(&node).unwrap();
        enter(&[share("a", &source, false)], None).unwrap();
        assert_ne!(std::fs::metadata("/share/a/null").unwrap().rdev(), 0);
        assert_eq!(error_kind(std::fs::read("/share/a/null").map(drop)), ErrorKind::PermissionDenied);
    });
}

#[test]
fn the_sockets_can_be_connected_to_and_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("s_1")).unwrap();
    in_child(|| {
        enter(&[], Some(directory.path())).unwrap();
        UnixStream::connect(Path::new(VSOCK).join("s_1")).unwrap();
        let replaced = std::fs::remove_file(Path::new(VSOCK).join("s_1"));
        assert_eq!(error_kind(replaced), ErrorKind::ReadOnlyFilesystem);
        assert!(std::fs::read_dir(SHARE).unwrap().next().is_none());
    });
    drop(listener);
}

#[test]
fn the_host_keeps_its_mounts() {
    let source = source();
    let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    in_child(|| enter(&[share("a", &source, true)], None).unwrap());
    assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
}

#[test]
fn errors_name_the_source() {
    let source = source();
    let socket = source.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    in_child(|| {
        let error = enter(&[share("a", "/no/such/place", true)], None).unwrap_err();
        assert_eq!(error.to_string(), "sharing /no/such/place: No such file or directory (os error 2)");
        let error = enter(&[share("a", &socket, true)], None).unwrap_err();
        let expected =
            format!("sharing {}: only a directory or a regular file can be shared", socket.display());
        assert_eq!(error.to_string(), expected);
    });
}

#[test]
fn a_process_with_threads_cannot_enter() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: entering a jail takes root");
    }
    let entered = std::thread::spawn(|| enter(&[], None)).join().unwrap();
    assert!(matches!(entered, Err(Error::Threads)));
}

#[test]
fn a_source_behind_a_symbolic_link_is_what_the_link_leads_to_when_it_is_opened() {
    let source = source();
    let link = source.path().join("link");
    std::os::unix::fs::symlink(source.path(), &link).unwrap();
    in_child(|| {
        enter(&[share("a", &link, true)], None).unwrap();
        assert_eq!(std::fs::read_to_string("/share/a/file").unwrap(), "content");
        // Seen from the jail the same link leads nowhere.
        assert!(std::fs::read_dir("/share/a/link/").is_err());
        let _ = rustix::mount::unmount("/share/a", UnmountFlags::DETACH);
    });
}
