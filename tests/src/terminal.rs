//! Terminals: one that `sandbox run` is started on, and one that it sends over a console socket.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{self, LocalFlags};
use nix::unistd::Pid;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::place::patience;
use crate::process::POLL;

nix::ioctl_write_ptr_bad!(
    /// Sets the size of a terminal's window.
    set_window_size,
    libc::TIOCSWINSZ, Winsize);
nix::ioctl_write_int_bad!(
    /// Makes a terminal the session's own.
    set_controlling_terminal,
    libc::TIOCSCTTY);

/// A program on a terminal whose other end the test holds. It is killed when this is dropped.
pub struct Terminal {
    child: Child,
    screen: Screen,
    slave: OwnedFd,
}

/// The end of a terminal at which somebody sits.
pub struct Screen {
    master: std::fs::File,
    seen: Arc<Mutex<Vec<u8>>>,
}

/// A socket to which a descriptor is sent, such as the other end of a terminal, as engines make one.
pub struct ConsoleSocket {
    /// Where it is.
    pub path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens at `path`.
    pub fn listen(path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("a console socket");
        Self { path: path.to_owned(), listener }
    }

    /// Takes the terminal that was sent. Call it after the command that sends it has ended.
    ///
    /// # Panics
    ///
    /// When none was.
    pub fn receive(&self) -> Screen {
        let (name, master) = self.receive_descriptor();
        assert!(name.starts_with(b"/dev/pts/"), "the terminal's name comes with it");
        Screen::of(master)
    }

    /// Takes whatever was sent, and the words that came with it.
    ///
    /// # Panics
    ///
    /// When nothing was.
    pub fn receive_descriptor(&self) -> (Vec<u8>, OwnedFd) {
        self.listener.set_nonblocking(true).expect("a socket can be made so");
        let (connection, _) = self.listener.accept().expect("somebody has connected");
        let (mut name, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let (bytes, flags) = (&mut [IoSliceMut::new(&mut name)], RecvFlags::CMSG_CLOEXEC);
        let got = rustix::net::recvmsg(&connection, bytes, &mut control, flags).expect("a message");
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        (name[..got.bytes].to_vec(), descriptor.expect("a descriptor"))
    }
}

impl Terminal {
    /// Starts `command` as the leader of a session on a new terminal.
    ///
    /// # Panics
    ///
    /// When the terminal or the program cannot be made.
    pub fn spawn(command: &mut Command, (columns, rows): (u16, u16)) -> Self {
        let pair = openpty(&window(columns, rows), None).expect("a terminal");
        let end = || Stdio::from(pair.slave.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: the closure makes two system calls and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                set_controlling_terminal(0, 0)?;
                Ok(())
            });
        }
        let child = command.spawn().expect("the program can be started");
        Self { child, screen: Screen::of(pair.master), slave: pair.slave }
    }

    /// Whether the terminal echoes and edits lines, as it does when no program has set it to raw mode.
    pub fn cooked(&self) -> bool {
        let modes = termios::tcgetattr(&self.slave).expect("a terminal has modes");
        modes.local_flags.contains(LocalFlags::ECHO | LocalFlags::ICANON)
    }

    /// Waits for the program's end and gives its exit code.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`], or a signal killed it.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let deadline = Instant::now() + patience();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status.code().unwrap_or_else(|| panic!("{status}: {:?}", self.seen()));
            }
            assert!(Instant::now() < deadline, "the program did not end: {:?}", self.seen());
            std::thread::sleep(POLL);
        }
    }
}

impl Deref for Terminal {
    type Target = Screen;

    fn deref(&self) -> &Screen {
        &self.screen
    }
}

impl Screen {
    fn of(master: OwnedFd) -> Self {
        let master = std::fs::File::from(master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        collect(master.try_clone().expect("a descriptor"), seen.clone());
        Self { master, seen }
    }

    /// Types.
    pub fn type_keys(&self, keys: &str) {
        (&self.master).write_all(keys.as_bytes()).expect("a terminal can be written to");
    }

    /// Types again and again until `text` was written to the terminal.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn type_keys_until(&self, keys: &str, text: &str) {
        let deadline = Instant::now() + patience();
        while !self.seen().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} did not appear on the terminal: {:?}", self.seen());
            self.type_keys(keys);
            std::thread::sleep(POLL * 20);
        }
    }

    /// Changes the window size.
    pub fn resize(&self, columns: u16, rows: u16) {
        // SAFETY: the pointer is to a Winsize that outlives the call.
        unsafe { set_window_size(self.master.as_raw_fd(), &window(columns, rows)) }.expect("a new size");
    }

    /// Everything that was written to the terminal so far.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().expect("no reader panics")).into_owned()
    }

    /// Waits until `text` was written to the terminal.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_until(text, |seen| seen.contains(text));
    }

    /// Waits until `text` is the last that was written to the terminal.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn wait_for_last(&self, text: &str) {
        self.wait_until(text, |seen| seen.ends_with(text));
    }

    #[track_caller]
    fn wait_until(&self, text: &str, appeared: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + patience();
        while !appeared(&self.seen()) {
            assert!(Instant::now() < deadline, "{text:?} did not appear on the terminal: {:?}", self.seen());
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn window(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn collect(mut master: std::fs::File, into: Arc<Mutex<Vec<u8>>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = master.read(&mut buffer) {
            into.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
        }
    });
}
