//! The guest's PID 1, as a program.
//!
//! It has a C `main` of its own because of what Rust's would do first: it opens `/dev/null` for every standard
//! descriptor that is closed and aborts where it cannot. A guest whose initramfs holds this program only has
//! neither descriptors nor `/dev/null`, and PID 1 must not abort.
#![no_main]

/// The entry from the C library's start code.
// SAFETY: the C start code calls the symbol `main` once, and no other crate of this program defines it.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    sandbox_agent::run()
}
