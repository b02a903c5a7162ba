//! What other processes ask of a sandbox: its client over the lifeline, other commands over its socket.

use serde::{Deserialize, Serialize};

/// A request.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Send a signal to the process.
    Signal {
        /// Its number on x86-64 Linux.
        signal: i32,
    },
    /// The user pressed the interrupt key, or sent SIGINT: a signal the first time, the end of the sandbox the
    /// second time.
    Interrupt,
    /// Set the size of the process's terminal.
    Resize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
}

/// The answer to a request.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// Not done.
    Refused {
        /// Why.
        message: String,
    },
}

impl Answer {
    /// A refusal.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::Refused { message: message.into() }
    }
}
