//! The OCI runtime: bundles are validated, machines are started, and one driver per sandbox leads it from
//! `creating` to `stopped`.
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`] | the command line of `sandbox` |
//! | [`spec`] | the bundle: reading, validating, turning host paths into guest paths |
//! | [`client`] | the foreground process: starts a monitor, forwards signals, holds the terminal |
//! | [`monitor`] | the process that owns a sandbox: its own start and its requests |
//! | [`sandbox`] | the driver: the phases of a sandbox's life, run by the monitor |
//! | [`machine`] | starting and ending `sandbox-vmm` |
//! | [`agent`] | the connections of the agent in the guest |
//! | [`stdio`] | moving the bytes of standard streams; terminals |
//! | [`cgroup`] | the cgroup of the host that a sandbox is put in |
//! | [`hooks`] | the hooks that run on the host |
//! | [`state`] | ids, states, the state directory |
//!
//! Nothing here knows KVM: that is `sandbox-vmm`, a process of its own.

pub mod agent;
pub mod artefact;
pub mod cgroup;
pub mod cli;
pub mod client;
pub mod descriptor;
pub mod exit;
pub mod hooks;
pub mod log;
pub mod machine;
pub mod monitor;
pub mod printable;
pub mod process;
pub mod quantity;
mod replace;
pub mod sandbox;
pub mod spec;
pub mod stand_in;
pub mod state;
pub mod stdio;
mod thread;
pub mod timings;
