//! The virtual machine monitor.

pub mod config;
pub mod fs;
pub mod machine;
pub mod timeline;
pub mod virtio;
