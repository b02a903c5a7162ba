//! The framework of the end-to-end tests: real bundles, run by the shipped binaries.
//!
//! A test reads like this:
//!
//! ```ignore
//! sandbox("cpus").option("--cpus", "2").run(["nproc"]).expect_stdout("2\n");
//! ```
//!
//! [`sandbox()`] makes a bundle with a busybox root and a private state directory; [`Sandbox::run`] runs
//! `sandbox run` and waits, [`Sandbox::spawn`] and [`Sandbox::terminal`] leave it running; [`container`] has the verbs
//! of engines, `create` and what follows. When the sandbox is
//! dropped, [`leaks`] checks that nothing of it is left on the host. [`vmm`] drives `sandbox-vmm` alone.
//!
//! Nothing here waits without an end: see [`place::patience`].

pub mod bare;
pub mod bundle;
pub mod cni;
pub mod container;
pub mod containerd;
pub mod debian;
pub mod disk;
pub mod docker;
pub mod gates;
pub mod initramfs;
pub mod kubelet;
pub mod leaks;
pub mod network;
pub mod orphan;
pub mod outcome;
pub mod pattern;
pub mod place;
pub mod pod;
pub mod podman;
pub mod process;
pub mod sandbox;
pub mod systemd_host;
pub mod terminal;
pub mod trace;
pub mod vmm;

pub use container::Container;
pub use containerd::Containerd;
pub use disk::Disk;
pub use docker::Docker;
pub use gates::Gates;
pub use kubelet::Kubelet;
pub use outcome::Outcome;
pub use place::skip;
pub use podman::Podman;
pub use sandbox::{Sandbox, sandbox};
