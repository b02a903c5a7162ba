//! Standard streams: bytes between our own descriptors and the guest's connections, and the terminal.

mod console;
mod relay;
mod terminal;

pub use console::{ConsoleError, open as open_console};
pub use relay::{Direction, Progress, Transfer, start};
pub use terminal::{RawTerminal, Saved, window_size};
