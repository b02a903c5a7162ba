//! Threads with small stacks: a monitor has about ten, and there is a monitor for every sandbox.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Room for the deepest calls of any of them, the reading of a JSON frame at `serde_json`'s recursion limit and, in a build
/// without optimisation, the joining of a pod. Only what is used of it takes memory.
const STACK_BYTES: usize = 512 << 10;

/// Starts a thread.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(body)
}
