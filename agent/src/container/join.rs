//! One more process of a running container, from its clone to its program.
//!
//! It is born into the container's cgroup and pid namespace and joins the others by the first process's pidfd. Its
//! streams are connected by then, so nothing is waited for: while it lives as a copy of the agent, each page that either
//! writes to is copied, and while the agent waits, it writes to none.

use std::os::fd::{AsFd, OwnedFd};

use oci_spec::runtime::{LinuxNamespaceType, Process};
use rustix::fs::{Mode, OFlags};
use rustix::thread::ThreadNameSpaceType;

use super::Container;
use super::beneath::Root;
use super::channel;
use super::init::begin_session;
use super::rights;
use super::scheduling;
use super::setup::SetupError;
use super::terminal::Terminal;
use super::user_namespace;
use super::workload::Workload;
use crate::stdio::ChildStdio;

/// Joins the container and executes the program, or says why not and ends.
pub fn run(
    container: &Container,
    process: &Process,
    init: &OwnedFd,
    channel: &OwnedFd,
    stdio: &ChildStdio,
) -> ! {
    let error = match set_up(container, process, init) {
        Ok(workload) => workload.run(channel, stdio),
        Err(e) => e,
    };
    channel::give_up(channel, error.failure());
    // SAFETY: it ends this process at once, without running what belongs to the agent that it is a copy of.
    unsafe { libc::_exit(1) }
}

fn set_up<'a>(
    container: &'a Container,
    process: &'a Process,
    init: &OwnedFd,
) -> Result<Workload<'a>, SetupError> {
    let namespaces = container.namespaces;
    begin_session()?;
    rights::give(None, process)?;
    scheduling::take_final_cpus(process.exec_cpu_affinity().as_ref())?;
    let kinds = ThreadNameSpaceType::from_bits_retain(namespaces.join_flags() as u32);
    rustix::thread::move_into_thread_name_spaces(init.as_fd(), kinds)
        .map_err(SetupError::step("join the container's namespaces"))?;
    if namespaces.has(LinuxNamespaceType::User) {
        user_namespace::become_root()?;
    }
    let terminal = match process.terminal() {
        Some(true) => Some(Terminal::open(&own_root()?, process)?),
        _ => None,
    };
    // The master of its terminal is fetched from it.
    let held = terminal.is_some();
    let (linux, filter) = (container.spec.linux().as_ref(), container.filter.as_ref());
    Ok(Workload { process, linux, filter, user: None, terminal, held, hooks: None })
}

fn own_root() -> Result<Root, SetupError> {
    rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map(Root::new)
        .map_err(SetupError::step("open the container's root"))
}
