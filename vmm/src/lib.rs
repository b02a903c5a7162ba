//! The virtual machine monitor.

pub mod boot;
pub mod bus;
pub mod config;
mod confine;
pub mod control;
pub mod devices;
pub mod events;
pub mod fs;
pub mod jail;
pub mod kvm;
pub mod legacy;
pub mod log;
pub mod machine;
pub mod memory;
pub mod output_limit;
pub mod panic_log;
pub mod probe;
pub mod process;
pub mod qemu;
mod root;
pub mod session;
pub mod timeline;
pub mod virtio;
pub mod vsock;
