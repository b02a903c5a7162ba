//! Our own terminal: its size, and raw mode with a way back.

use std::io;
use std::os::fd::AsFd;
use std::sync::Once;

use rustix::termios::{OptionalActions, Termios};

/// The size of a terminal in columns and rows. `None`: it is no terminal, or has no size.
pub fn window_size(terminal: impl AsFd) -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(terminal).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// The settings of the terminal on standard input, to go back to.
#[derive(Clone, Debug)]
pub struct Saved(Termios);

impl Saved {
    /// The settings now. `None`: standard input is no terminal.
    pub fn now() -> Option<Self> {
        rustix::termios::tcgetattr(io::stdin()).ok().map(Self)
    }

    /// Sets them again.
    pub fn restore(&self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The terminal on standard input in raw mode: every key goes to the guest, and the guest's terminal does what
/// terminals do. Dropping it goes back, and so does a panic.
#[derive(Debug)]
pub struct RawTerminal {
    saved: Saved,
}

impl RawTerminal {
    /// Makes the terminal raw. `None`: standard input is no terminal.
    pub fn enter() -> Option<Self> {
        let raw = Self { saved: Saved::now()? };
        raw.restore_on_panic();
        raw.apply();
        Some(raw)
    }

    /// Makes it raw again, after somebody else has had it (a stopped job that goes on).
    pub fn apply(&self) {
        let mut raw = self.saved.0.clone();
        raw.make_raw();
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw);
    }

    /// A panic ends the process without dropping anything.
    fn restore_on_panic(&self) {
        static HOOK: Once = Once::new();
        let saved = self.saved.clone();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                saved.restore();
                before(panic);
            }));
        });
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.saved.restore();
    }
}
