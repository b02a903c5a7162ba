//! The signals of a monitor that stands for its container: they are meant for the process in the guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};

use crate::client::Signals;
use crate::sandbox::{Event, Request, Sender, Serial};
use crate::stdio::window_size;
use crate::thread;

/// Passes the size of a terminal on to the process.
#[derive(Clone, Debug)]
pub struct Resize {
    container: Serial,
    terminal: Arc<OwnedFd>,
    sender: Sender,
}

impl Resize {
    /// Does it, if the terminal has a size.
    pub fn now(&self) {
        if let Some((width, height)) = window_size(&self.terminal) {
            // A thread of its own may wait for the driver; the driver itself, who calls this too, must not.
            let request = Request::Resize { width, height };
            let _ = self.sender.try_send(Event::Request(self.container, request, None));
        }
    }
}

/// Passes signals on to the driver, and the size of the terminal, if there is one, in a thread of its own.
pub fn pass_on(terminal: Option<OwnedFd>, container: Serial, sender: Sender) -> io::Result<Option<Resize>> {
    let mut signals = Signals::block()?;
    let resize =
        terminal.map(|terminal| Resize { container, terminal: Arc::new(terminal), sender: sender.clone() });
    let resizing = resize.clone();
    thread::spawn("signals", move || {
        loop {
            let _ = rustix::event::poll(&mut [PollFd::new(&signals.as_fd(), PollFlags::IN)], None);
            while let Some(signal) = signals.take() {
                match (signal, &resizing) {
                    (Signal::SIGWINCH, Some(resize)) => resize.now(),
                    (Signal::SIGWINCH, None) => {}
                    (signal, _) => {
                        let request = Request::Signal { signal: signal as i32, all: false };
                        if sender.send(Event::Request(container, request, None)).is_err() {
                            return;
                        }
                    }
                }
            }
        }
    })?;
    Ok(resize)
}
