use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use super::*;

/// What the test program is told to try, in a process of its own: it may end by it.
const ATTEMPT: &str = "SANDBOX_TEST_ATTEMPT";

/// Every kind of thread, and what the tests call it.
const KINDS: [(&str, Kind); 8] = [
    ("vcpu", Kind::Vcpu),
    ("devices", Kind::Devices),
    ("files", Kind::Files(Access::ReadWrite)),
    ("reader", Kind::Files(Access::ReadOnly)),
    ("vhost", Kind::VhostUser),
    ("listener", Kind::Listener),
    ("control", Kind::Control),
    ("killer", Kind::ControlOfQemu),
];

/// Not a test of its own: what the others have another process do.
#[test]
fn attempt() {
    let Ok(what) = std::env::var(ATTEMPT) else { return };
    let (name, call) = what.split_once(' ').unwrap();
    let (_, kind) = KINDS.into_iter().find(|(kind, _)| *kind == name).unwrap();
    let call = call.to_owned();
    rustix::thread::set_no_new_privs(true).unwrap();
    std::thread::Builder::new()
        .name("confined".to_owned())
        .spawn(move || {
            enter(kind);
            make(&call);
        })
        .unwrap()
        .join()
        .unwrap();
}

/// A process that there never is: Linux has no numbers as high as this.
const NOBODY: libc::pid_t = libc::pid_t::MAX;

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
            "thread of another" => _ = libc::syscall(libc::SYS_tgkill, 1, 1, 0),
            "signal" => _ = libc::kill(NOBODY, 0),
            "kill" => _ = libc::kill(NOBODY, libc::SIGKILL),
            "wait" => _ = libc::waitpid(NOBODY, std::ptr::null_mut(), libc::WNOHANG),
            "open" => _ = libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), libc::O_PATH),
            "program" => {
                let nothing = std::ptr::null::<*const u8>();
                libc::syscall(libc::SYS_execve, c"/".as_ptr(), nothing, nothing);
            }
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
    for (kind, _) in KINDS {
        let output = try_it(&format!("{kind} nothing"));
        assert!(output.status.success(), "{kind}: {output:?}");
    }
    for what in ["devices unix", "files chown", "files open", "reader open", "killer kill", "killer wait"] {
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
        ("vcpu thread of another", libc::SYS_tgkill),
        ("devices inet", libc::SYS_socket),
        ("devices chown", libc::SYS_fchownat),
        ("files unix", libc::SYS_socket),
        ("reader chown", libc::SYS_fchownat),
        ("reader uid 0", libc::SYS_setresuid),
        ("vhost unix", libc::SYS_socket),
        ("listener unix", libc::SYS_socket),
        ("control unix", libc::SYS_socket),
        ("control chown", libc::SYS_fchownat),
        ("control kill", libc::SYS_kill),
        ("control wait", libc::SYS_wait4),
        ("killer unix", libc::SYS_socket),
        ("killer signal", libc::SYS_kill),
    ] {
        expect_refusal(what, call);
    }
}

#[test]
fn no_kind_starts_a_program_or_makes_code_and_only_file_servers_open_files() {
    for (name, kind) in KINDS {
        expect_refusal(&format!("{name} program"), libc::SYS_execve);
        expect_refusal(&format!("{name} code"), libc::SYS_mmap);
        if !matches!(kind, Kind::Files(_)) {
            expect_refusal(&format!("{name} open"), libc::SYS_openat);
        }
    }
}

#[track_caller]
fn expect_refusal(what: &str, call: i64) {
    let output = try_it(what);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = format!("the thread confined made the system call {call}, which its work never needs");
    assert!(error.contains(&line), "{what}: {output:?}");
    assert_eq!(output.status.code(), Some(1), "{what}");
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
