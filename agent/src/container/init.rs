//! The first process of a container, from its clone to its program.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::fs::Mode;
use rustix::thread::ThreadNameSpaceType;

use super::beneath::{Kind, Root};
use super::hooks::StartHooks;
use super::mounts::{self, Surroundings};
use super::namespaces::{self, Namespaces};
use super::setup::SetupError;
use super::terminal::Terminal;
use super::workload::{self, Workload};
use super::{First, Shared, channel, devices, hidden, network, rootfs, sysctl, time, user_namespace};
use crate::stdio::ChildStdio;

/// Sets the container up and executes its program, or says why not and ends.
///
/// `made_outside` is the root, where this process could not make it.
pub fn run(first: &First<'_>, made_outside: Option<OwnedFd>, channel: &OwnedFd, stdio: &ChildStdio) -> ! {
    let set_up = channel::wait_for_word(channel)
        .map_err(SetupError::step("wait for the agent"))
        .and_then(|()| set_up(first, made_outside));
    let error = match set_up {
        Ok(workload) => workload.run(channel, stdio),
        Err(e) => e,
    };
    channel::give_up(channel, error.failure());
    // SAFETY: it ends this process at once, without running what belongs to the agent that it is a copy of.
    unsafe { libc::_exit(1) }
}

fn set_up<'a>(first: &First<'a>, made_outside: Option<OwnedFd>) -> Result<Workload<'a>, SetupError> {
    let First { create, namespaces, shared, filter, cgroup } = *first;
    let spec = &create.spec;
    let process = spec.process().as_ref().ok_or(SetupError::NoProcess)?;
    begin_session()?;
    if namespaces.has(LinuxNamespaceType::User) {
        user_namespace::become_root()?;
    }
    join(shared)?;
    name(spec, namespaces)?;
    let root = rootfs::assemble(spec, create.root, made_outside)?;
    let terminal = fill(spec, process, &root, namespaces, cgroup.path())?;
    let hooks =
        StartHooks::of(spec, &create.container).map_err(SetupError::step("prepare hooks.startContainer"))?;
    rootfs::enter(spec, &root)?;
    let (linux, user) = (spec.linux().as_ref(), create.user.as_deref());
    Ok(Workload { process, linux, filter, user, terminal, held: true, hooks })
}

/// A session of its own, with nothing of the agent's signals; modes are as they are asked for.
pub fn begin_session() -> Result<(), SetupError> {
    workload::reset_signals()?;
    rustix::process::umask(Mode::empty());
    rustix::process::setsid().map(drop).map_err(SetupError::step("begin a session"))
}

/// Joins the namespaces of other containers. It has been born into that of process ids, if it shares one.
fn join(shared: &[Shared]) -> Result<(), SetupError> {
    for Shared { kind, process } in shared.iter().filter(|shared| shared.kind != LinuxNamespaceType::Pid) {
        let flag = namespaces::flag(*kind).cast_unsigned();
        let flag = ThreadNameSpaceType::from_bits_retain(flag);
        rustix::thread::move_into_thread_name_spaces(process.as_fd(), flag)
            .map_err(SetupError::step_of(|| format!("join the {kind} namespace of another container")))?;
    }
    Ok(())
}

/// What the container's namespaces say: its names, its network, its kernel settings.
fn name(spec: &Spec, namespaces: Namespaces) -> Result<(), SetupError> {
    if namespaces.has(LinuxNamespaceType::Cgroup) {
        // SAFETY: this process has one thread and shares no file descriptors with any other.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }
            .map_err(SetupError::step("make a cgroup namespace"))?;
    }
    if namespaces.has(LinuxNamespaceType::Time) {
        time::make(spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref()))?;
    }
    if let Some(hostname) = spec.hostname().as_ref().filter(|name| !name.is_empty()) {
        rustix::system::sethostname(hostname.as_bytes())
            .map_err(SetupError::step_of(|| format!("set the host name to {hostname:?}")))?;
    }
    if let Some(domain) = spec.domainname().as_ref().filter(|name| !name.is_empty()) {
        rustix::system::setdomainname(domain.as_bytes())
            .map_err(SetupError::step_of(|| format!("set the domain name to {domain:?}")))?;
    }
    if namespaces.has(LinuxNamespaceType::Network) {
        network::loopback_up().map_err(SetupError::step("bring the loopback interface up"))?;
    }
    if let Some(settings) = spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref()) {
        match shares_network_without_power(namespaces) {
            true => sysctl::write_but_for_network(settings)?,
            false => sysctl::write(settings)?,
        }
    }
    Ok(())
}

/// Whether a container is in the sandbox's network and its root has no power over that, being an ordinary user of the
/// guest.
pub fn shares_network_without_power(namespaces: Namespaces) -> bool {
    namespaces.has(LinuxNamespaceType::User) && !namespaces.has(LinuxNamespaceType::Network)
}

/// Everything inside the root.
fn fill(
    spec: &Spec,
    process: &Process,
    root: &Root,
    namespaces: Namespaces,
    cgroup: &Path,
) -> Result<Option<Terminal>, SetupError> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let around = Surroundings { cgroup: (!namespaces.has(LinuxNamespaceType::Cgroup)).then_some(cgroup) };
    mounts::carry_out(mounts, root, around)?;
    devices::populate(spec, root)?;
    let terminal = match process.terminal() {
        Some(true) => Some(Terminal::open(root, process)?),
        _ => None,
    };
    if let Some(terminal) = &terminal {
        devices::show_console(root, &terminal.slave)?;
    }
    root.make(process.cwd(), Kind::Directory)?;
    mounts::finish(mounts, root)?;
    if let Some(linux) = spec.linux() {
        hidden::hide(linux, root)?;
    }
    Ok(terminal)
}
