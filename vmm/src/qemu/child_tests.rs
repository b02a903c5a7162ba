//! The child process, with a shell in QEMU's place.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;

use super::Qemu;

/// Whose the child is.
const USER: u32 = 0x7900_0001;

fn shell(script: &str, descriptors: &[&File]) -> Qemu {
    let descriptors: Vec<_> = descriptors.iter().map(|file| file.as_fd()).collect();
    let mut child =
        Qemu::start("/bin/sh", &["-c".to_owned(), script.to_owned()], &descriptors, USER).unwrap();
    child.listen().unwrap();
    child
}

#[test]
fn its_status_and_last_words_are_kept_without_control_characters() {
    let mut child = shell("printf 'one\\n\\033[31mtwo\\n' >&2; exit 3", &[]);
    assert_eq!(child.wait().code(), Some(3));
    assert_eq!(child.last_words(), "one; [31mtwo");
}

#[test]
fn of_many_words_only_the_last_are_kept() {
    let mut child = shell("i=0; while [ $i -lt 2000 ]; do echo line $i >&2; i=$((i+1)); done", &[]);
    child.wait();
    let words = child.last_words();
    assert!(words.len() < 8192 && words.ends_with("line 1999"), "{words}");
}

#[test]
fn it_inherits_the_descriptors_it_is_given_and_no_other() {
    let (given, kept) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
    // Not every descriptor of a process is closed on exec.
    rustix::io::fcntl_setfd(&kept, rustix::io::FdFlags::empty()).unwrap();
    let mut child = shell("for fd in /proc/self/fd/*; do readlink $fd; done >&2", &[&given]);
    child.wait();
    let words = child.last_words();
    assert!(!words.contains("zero"), "{words}");
    let mut child = shell(&format!("readlink /proc/self/fd/{} >&2", given.as_raw_fd()), &[&given]);
    child.wait();
    // Root's child has left the host's root, and names what is outside by its own mount.
    assert!(child.last_words().ends_with("/null"), "{}", child.last_words());
}

#[test]
fn it_has_no_rights_no_files_and_no_company() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give rights up");
        return;
    }
    let script = "id -u >&2; grep -E 'NoNewPrivs|CapEff' /proc/self/status >&2; \
                  echo x > /usr/qemu-was-here && echo written >&2; \
                  for name in boot dev etc/passwd home mnt opt proc/sys root run srv sys tmp var; do \
                  [ -e /$name ] && echo it has $name >&2; done; \
                  echo it sees /proc/[0-9]* >&2; \
                  readlink /proc/self/ns/net >&2";
    let mut child = shell(script, &[]);
    let pid = child.child.id();
    child.wait();
    let words = child.last_words();
    assert!(words.starts_with(&format!("{USER}; ")), "{words}");
    assert!(words.contains("CapEff:0000000000000000") && words.contains("NoNewPrivs:1"), "{words}");
    assert!(words.contains("Read-only file system") && !words.contains("written"), "{words}");
    assert!(!words.contains("it has"), "{words}");
    assert!(words.contains(&format!("it sees /proc/{pid}; ")), "{words}");
    let network = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert!(words.contains("net:[") && !words.contains(network.to_str().unwrap()), "{words}");
}

#[test]
fn it_is_gone_when_it_is_dropped() {
    let child = shell("exec sleep 1000", &[]);
    let pid = child.child.id();
    drop(child);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_kill_is_its_end() {
    let mut child = shell("exec sleep 1000", &[]);
    assert_eq!(child.kill().signal(), Some(libc::SIGKILL));
    assert_eq!(child.kill().signal(), Some(libc::SIGKILL), "again");
}
