//! The virtual machine monitor.

pub mod virtio;
