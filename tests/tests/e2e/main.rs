//! End-to-end tests through the shipped binaries, one file per subject.

mod abrupt;
mod bad_input;
mod consoles;
mod deaths;
mod docker;
mod exec;
mod fields;
mod files;
mod guide;
mod hooks;
mod host_cgroup;
mod information;
mod lifecycle;
mod limits;
mod machine;
mod many;
mod podman;
mod resources;
mod running;
mod scheduling;
mod start_hooks;
mod streams;
mod terminal;
mod user_namespaces;
mod verbs;
mod verbs_bad_input;
