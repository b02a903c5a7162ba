//! `sandbox run` on a terminal.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{self, LocalFlags};
use nix::unistd::Pid;

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
    master: std::fs::File,
    slave: OwnedFd,
    seen: Arc<Mutex<Vec<u8>>>,
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
        let master = std::fs::File::from(pair.master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        collect(master.try_clone().expect("a descriptor"), seen.clone());
        Self { child, master, slave: pair.slave, seen }
    }

    /// Types.
    pub fn type_keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("a terminal can be written to");
    }

    /// Types again and again until `text` was written to the terminal.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`patience`].
    #[track_caller]
    pub fn type_keys_until(&mut self, keys: &str, text: &str) {
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

    /// Whether the terminal echoes and edits lines, as it does when no program has set it to raw mode.
    pub fn cooked(&self) -> bool {
        let modes = termios::tcgetattr(&self.slave).expect("a terminal has modes");
        modes.local_flags.contains(LocalFlags::ECHO | LocalFlags::ICANON)
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
