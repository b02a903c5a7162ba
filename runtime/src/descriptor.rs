//! Descriptors, sessions and namespaces across `exec`: the one file that needs `unsafe` for it.
//!
//! A child of ours gets the standard streams that its [`Command`] names and the descriptors listed for it,
//! nothing else: everything is opened close-on-exec, and what we inherited ourselves is marked so at the start.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::fs::FileType;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Descriptors below this number may be the place of one that a child expects.
const FIRST_FREE: RawFd = 16;

/// What a child has to do with its parent's terminal and life.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ties {
    /// It belongs to the same job: signals of the terminal reach it, and it may read from the terminal.
    Job,
    /// It is in a session of its own, has no signals blocked, and is killed when the thread that started it ends.
    Machine,
    /// It is in a session of its own, and lives on when its parent ends.
    None,
}

/// Lets a command have descriptors at the numbers given.
pub fn give(command: &mut Command, descriptors: &[(BorrowedFd<'_>, RawFd)], ties: Ties) -> io::Result<()> {
    let mut moves = Vec::new();
    for (descriptor, place) in descriptors {
        // Out of the way of every place, so that no move overwrites the source of the next.
        moves.push((rustix::io::fcntl_dupfd_cloexec(descriptor, FIRST_FREE)?, *place));
    }
    let in_child = move || {
        for (descriptor, place) in &moves {
            // SAFETY: both are plain numbers; dup2 closes what was at `place`, which nothing in the child owns.
            if unsafe { libc::dup2(descriptor.as_raw_fd(), *place) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        match ties {
            Ties::Job => Ok(()),
            Ties::Machine => cut_ties(),
            Ties::None => Ok(rustix::process::setsid().map(drop)?),
        }
    };
    // SAFETY: between fork and exec only async-signal-safe system calls are made and nothing is allocated.
    unsafe { command.pre_exec(in_child) };
    Ok(())
}

/// Lets a command run in this network namespace.
pub fn run_in(command: &mut Command, network: OwnedFd) {
    let enter = move || Ok(move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?);
    // SAFETY: between fork and exec one system call is made.
    unsafe { command.pre_exec(enter) };
}

/// Starts a command as the first process of a process id namespace: it sees no process but those that it starts,
/// and they end with it, however it ends.
pub fn spawn_alone(command: &mut Command) -> io::Result<Child> {
    let own = std::fs::File::open("/proc/self/ns/pid")?;
    // SAFETY: what is unshared is the namespace of children to come. The thread starts none of its own, nor a
    // thread, before it has its own namespace back.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
    let spawned = command.spawn();
    let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID));
    let mut child = spawned?;
    if let Err(error) = back {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error.into());
    }
    Ok(child)
}

/// Runs between fork and exec.
fn cut_ties() -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // SAFETY: an all-zero set is the empty one, and the pointers are valid or null as the call allows.
    let unblocked = unsafe {
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut())
    };
    match unblocked {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes a descriptor that our parent put at `place` for us. Call it once for each place, before anything else
/// is opened.
pub fn take(place: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number is only looked at; a closed one makes the call fail.
    let open = unsafe { libc::fcntl(place, libc::F_GETFD) };
    if open < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, was put there for us by the parent, and nothing else in this process refers to it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(place) };
    rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)?;
    Ok(descriptor)
}

/// Keeps every descriptor but the standard streams from our children, whoever opened it.
pub fn keep_from_children() {
    // SAFETY: it changes flags of descriptors and closes none. An older kernel refuses, and nothing is lost but
    // the protection from a parent that leaks descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// A copy of one of our standard streams, to read or write without the locks and buffers of the library.
pub fn copy_of(stream: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(stream, FIRST_FREE)?)
}

/// Whether a descriptor is of `/dev/null`.
pub fn is_null(descriptor: &OwnedFd) -> bool {
    const NULL: (u32, u32) = (1, 3);
    rustix::fs::fstat(descriptor).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == NULL
    })
}

/// Lets go of our standard streams, which somebody may wait for the end of.
pub fn drop_standard_streams() -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// The most descriptors of one message: the standard streams.
const MAX_SENT: usize = 3;

/// Sends bytes with descriptors over a socket, in one message.
pub fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    let mut rest = socket;
    rest.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Receives bytes and the descriptors that come with them, at most [`MAX_SENT`].
pub fn receive(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok((got.bytes, descriptors.flatten().collect()))
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_child_has_what_it_was_given_and_nothing_else() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo here >&9; for fd in /proc/$$/fd/*; do echo ${fd##*/}; done"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        give(&mut command, &[(writer.as_fd(), 9)], Ties::Job).unwrap();
        let output = command.output().unwrap();
        drop((command, writer));
        assert_eq!(std::io::read_to_string(reader).unwrap(), "here\n");
        let listed = String::from_utf8(output.stdout).unwrap();
        // The shell itself opens the directory that it lists, and its script at 10 or above.
        assert!(listed.lines().all(|fd| matches!(fd.parse(), Ok(0..=3 | 9..))), "{listed}");
    }

    #[test]
    fn null_is_known_whatever_it_is_called() {
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        let null = open("/dev/null");
        assert!(is_null(&null) && is_null(&open(&format!("/proc/self/fd/{}", null.as_raw_fd()))));
        assert!(!is_null(&open("/dev/zero")) && !is_null(&open("/dev")) && !is_null(&open("/etc/passwd")));
    }

    #[test]
    fn a_closed_place_is_an_error() {
        assert!(take(9999).is_err());
    }
}
