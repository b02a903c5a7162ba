//! The OCI runtime: bundles are validated, machines are started, and one driver per sandbox leads it from
//! `creating` to `stopped`.
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`] | the command line of `sandbox` |
//! | [`lifecycle`] | what can be done with a sandbox, for the command line and for shims |
//! | [`spec`] | the bundle: reading, validating, turning host paths into guest paths |
//! | [`config`] | what the operator wants of every sandbox |
//! | [`client`] | the foreground process: starts a monitor, forwards signals, holds the terminal |
//! | [`monitor`] | the process that owns a sandbox: its own start and its requests |
//! | [`sandbox`] | the driver: the phases of a sandbox's life, run by the monitor |
//! | [`machine`] | starting and ending `sandbox-vmm` |
//! | [`agent`] | the connections of the agent in the guest |
//! | [`stdio`] | moving the bytes of standard streams; terminals |
//! | [`cgroup`] | the cgroup of the host that a sandbox is put in |
//! | [`share`] | the files of a machine that runs: adding a container's, and taking them away |
//! | [`block`] | the block devices of the host that a container is given |
//! | [`vmm_control`] | asking a machine's process something while it runs |
//! | [`hooks`] | the hooks that run on the host |
//! | [`metrics`] | what sandboxes do, in numbers |
//! | [`features`] | what the runtime can do, for engines |
//! | [`state`] | ids, states, the state directory |
//!
//! Nothing here knows KVM: that is `sandbox-vmm`, a process of its own.

pub mod agent;
pub mod artefact;
pub mod block;
pub mod cgroup;
pub mod cli;
pub mod client;
pub mod config;
pub mod descriptor;
mod engine;
pub mod exit;
pub mod features;
pub mod hooks;
mod identity;
pub mod lifecycle;
pub mod listening;
pub mod log;
pub mod machine;
pub mod metrics;
pub mod monitor;
mod mounts;
pub mod network;
pub mod printable;
pub mod process;
pub mod quantity;
mod replace;
pub mod sandbox;
pub mod share;
pub mod spec;
pub mod stand_in;
pub mod state;
pub mod stdio;
mod thread;
pub mod timings;
pub mod view;
pub mod vmm_control;

use std::ffi::OsString;

/// Carries out the hidden subcommands with which a sandbox's own processes are started from the running binary.
/// Every program that makes sandboxes calls this before anything else. Returns the exit code; `None`: the
/// arguments are those of no hidden subcommand.
pub fn hidden(args: &[OsString]) -> Option<u8> {
    fn code_of(ended: Result<u8, impl std::fmt::Display>) -> u8 {
        ended.unwrap_or_else(|error| {
            log::Log::plain().error(&error.to_string());
            exit::SANDBOX_FAILED
        })
    }
    match args.get(1)?.to_str()? {
        monitor::SUBCOMMAND => Some(code_of(monitor::main(args.get(2).map(OsString::as_os_str)))),
        stand_in::SUBCOMMAND => Some(code_of(stand_in::main())),
        stand_in::MEMBER => Some(code_of(stand_in::member())),
        client::HOLDER => Some(code_of(client::holder())),
        _ => None,
    }
}
