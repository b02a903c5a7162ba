use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use super::*;

/// What the test program is told to try, in a process of its own: it may end by it.
const ATTEMPT: &str = "SANDBOX_TEST_ATTEMPT";

/// Not a test of its own: what the others have another process do.
#[test]
fn attempt() {
    let Ok(what) = std::env::var(ATTEMPT) else { return };
    let kind = match what.split_once(' ') {
        Some(("vcpu", _)) => Kind::Vcpu,
        Some(("devices", _)) => Kind::Devices,
        Some(("files", _)) => Kind::Files(Access::ReadWrite),
        Some(("reader", _)) => Kind::Files(Access::ReadOnly),
        _ => Kind::Control,
    };
    rustix::thread::set_no_new_privs(true).unwrap();
    std::thread::Builder::new()
        .name("confined".to_owned())
        .spawn(move || {
            enter(kind);
            make(what.split_once(' ').unwrap().1);
        })
        .unwrap()
        .join()
        .unwrap();
}

fn make(call: &str) {
    // SAFETY: system calls on integers and constant strings, of which none does anything here.
    unsafe {
        match call {
            "nothing" => {}
            "uid" => _ = libc::syscall(libc::SYS_getuid),
            "uid 0" => _ = libc::syscall(libc::SYS_setresuid, 0, 0, 0),
            "inet" => _ = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0),
            "unix" => _ = libc::close(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)),
            "code" => {
                let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0);
            }
            "kill" => _ = libc::syscall(libc::SYS_tgkill, 1, 1, 0),
            "ioctl" => _ = libc::ioctl(0, libc::TIOCSTI as _, 0),
            "thread" => drop(std::thread::spawn(|| ()).join()),
            "chown" => _ = libc::fchownat(libc::AT_FDCWD, c"/".as_ptr(), 0, 0, 0),
            call => panic!("what is {call}?"),
        }
    }
}

fn try_it(what: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confine::tests::attempt", "--nocapture"])
        .env(ATTEMPT, what)
        .output()
        .unwrap()
}

#[test]
fn what_the_work_needs_is_allowed() {
    for what in ["vcpu nothing", "devices unix", "files chown", "reader nothing", "control nothing"] {
        let output = try_it(what);
        assert!(output.status.success(), "{what}: {output:?}");
    }
}

#[test]
fn what_the_work_does_not_need_ends_the_process_with_its_name_and_number() {
    for (what, call) in [
        ("vcpu uid", libc::SYS_getuid),
        ("vcpu unix", libc::SYS_socket),
        ("vcpu ioctl", libc::SYS_ioctl),
        ("vcpu kill", libc::SYS_tgkill),
        ("vcpu code", libc::SYS_mmap),
        ("devices inet", libc::SYS_socket),
        ("devices chown", libc::SYS_fchownat),
        ("files unix", libc::SYS_socket),
        ("reader chown", libc::SYS_fchownat),
        ("reader uid 0", libc::SYS_setresuid),
        ("files code", libc::SYS_mmap),
        ("control chown", libc::SYS_fchownat),
    ] {
        let output = try_it(what);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = format!("the thread confined made the system call {call}, which its work never needs");
        assert!(error.contains(&line), "{what}: {output:?}");
        assert_eq!(output.status.code(), Some(1), "{what}");
    }
}

#[test]
fn no_thread_is_started_by_a_confined_one() {
    let output = try_it("devices thread");
    // No handler runs then: the C library has blocked all signals.
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
}

#[test]
fn capabilities_are_those_that_are_kept() {
    let kept = |set| {
        std::thread::spawn(move || {
            keep_capabilities(set).unwrap();
            rustix::thread::capabilities(None).unwrap()
        })
        .join()
        .unwrap()
    };
    assert!(kept(CapabilitySet::empty()).permitted.is_empty());
    let files = kept(TO_WRITE);
    assert!(TO_WRITE.contains(files.permitted) && TO_WRITE.contains(files.effective));
    assert!(files.inheritable.is_empty());
}
