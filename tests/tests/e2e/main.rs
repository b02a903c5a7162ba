//! End-to-end tests through the shipped binaries, one file per subject.

mod abrupt;
mod bad_input;
mod fields;
mod files;
mod guide;
mod hooks;
mod information;
mod machine;
mod many;
mod podman;
mod resources;
mod running;
mod scheduling;
mod start_hooks;
mod streams;
mod terminal;
