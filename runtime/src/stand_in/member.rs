//! What stands for a container that joins a sandbox: it has no monitor of its own, but a line to the sandbox's.
//!
//! It asks for the container, with its own standard streams, and holds the connection as long as the container lives:
//! its end is the container's, whoever's it comes first.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use sandbox_protocol::frame;
use sandbox_vmm_api::ShareEntry;
use serde::{Deserialize, Serialize};

use super::{DOOR_FD, FromStandIn, StandInError, host_io, take_place};
use crate::client::Signals;
use crate::monitor::{Added, MAX_LIFELINE_BYTES};
use crate::sandbox::{ContainerPlan, Ends, Request};
use crate::stdio::{open_console, window_size};
use crate::view::View;
use crate::{descriptor, exit};

/// The name of the hidden subcommand.
pub const MEMBER: &str = "member-stand-in";

/// What it gets from its client.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Join {
    pub view: View,
    /// The request socket of the sandbox.
    pub socket: PathBuf,
    pub container: ContainerPlan,
    pub shares: Vec<ShareEntry>,
}

/// What the hidden subcommand does. Returns the exit code, which is the container's.
pub fn member() -> Result<u8, StandInError> {
    let door = descriptor::take(DOOR_FD).map_err(host_io("find the door"))?;
    let mut door = UnixStream::from(door);
    let join: Join = frame::read(&mut door, MAX_LIFELINE_BYTES)?.ok_or(StandInError::Gone)?;
    let mut signals = Signals::block().map_err(host_io("receive signals"))?;
    let cgroup = join.container.cgroup.clone();
    let (answer, stands) = match stand(join, &door) {
        Ok(stands) => (FromStandIn::Ready, Some(stands)),
        Err(error) => (FromStandIn::Failed(error.to_string()), None),
    };
    if let (Some(cgroup), None) = (cgroup, &stands) {
        // Nobody is going to delete what never stood.
        cgroup.leave(std::iter::once(std::process::id()));
    }
    // A client that is gone has killed nobody, and the container stands.
    let _ = frame::write(&mut door, &answer, MAX_LIFELINE_BYTES);
    drop(door);
    match stands {
        Some((mut added, terminal)) => Ok(attend(&mut added, &mut signals, terminal.as_ref())),
        None => Ok(exit::FAILED),
    }
}

/// Until the container stands, and this process among its files.
fn stand(join: Join, door: &UnixStream) -> Result<(Added, Option<OwnedFd>), StandInError> {
    let failed = |error: &dyn std::fmt::Display| StandInError::Failed(error.to_string());
    let Join { view, socket, container, shares } = join;
    if let Some(cgroup) = &container.cgroup {
        cgroup.enter(std::iter::once(std::process::id())).map_err(|e| failed(&e))?;
    }
    let terminal = container.console_socket.as_deref().map(open_console).transpose();
    let terminal = terminal.map_err(|e| failed(&e))?;
    let ends = match &terminal {
        Some(terminal) => Ends::terminal(terminal),
        None => Ends::inherited(),
    };
    let ends = ends.map_err(host_io("copy the standard streams"))?;
    let request = Request::Join { container: Box::new(container), shares };
    let mut added = Added::ask_for(&socket, &request, ends).map_err(|e| failed(&e))?;
    wait_beside(door, &added)?;
    added.stands().map_err(|e| failed(&e))?;
    take_place(&view)?;
    Ok((added, terminal))
}

/// Waits for news. A client that goes away meanwhile does not want the container any more.
fn wait_beside(door: &UnixStream, added: &Added) -> Result<(), StandInError> {
    loop {
        let sources = [door.as_fd(), added.as_fd()];
        let mut ready = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
        let _ = rustix::event::poll(&mut ready, None);
        let [client, news] = ready.map(|source| !source.revents().is_empty());
        match (client, news) {
            (_, true) => return Ok(()),
            (true, false) => return Err(StandInError::Gone),
            (false, false) => {}
        }
    }
}

/// Passes signals and the terminal's size on until the container has ended. Returns its exit code.
fn attend(added: &mut Added, signals: &mut Signals, terminal: Option<&OwnedFd>) -> u8 {
    let resize = |added: &Added| {
        if let Some((width, height)) = terminal.and_then(window_size) {
            added.ask(&Request::Resize { width, height });
        }
    };
    resize(added);
    while !(added.has_news() || signals.wait_beside(added)) {
        while let Some(signal) = signals.take() {
            match signal {
                Signal::SIGWINCH => resize(added),
                signal => added.ask(&Request::Signal { signal: signal as i32, all: false }),
            }
        }
    }
    // Without a word, it went down with its sandbox.
    added.wait().map_or(exit::KILLED, |status| status.shell_code())
}
