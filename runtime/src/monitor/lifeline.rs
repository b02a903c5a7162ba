//! Between a client and its monitor: frames like those of the agent's protocol, over the lifeline.

use std::io;
use std::os::unix::net::UnixStream;

use sandbox_protocol::{MAX_TO_GUEST_BYTES, frame};
use sandbox_vmm_api::MachineKind;
use serde::{Deserialize, Serialize};

use crate::sandbox::{Ending, Event, Request, Sender, Serial};
use crate::thread;
use crate::timings::Timeline;

/// The most bytes of a frame: a plan holds a configuration as large as the guest takes, and a little more.
pub const MAX_LIFELINE_BYTES: u32 = 2 * MAX_TO_GUEST_BYTES;

/// What a monitor tells its client.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromMonitor {
    /// The machine runs.
    Machine {
        /// Which.
        kind: MachineKind,
        /// Why this one.
        reason: String,
    },
    /// The container stands, and its process waits to be started.
    Created,
    /// The process runs.
    Started,
    /// The sandbox has ended, and nothing is left of it.
    Ended {
        /// How.
        ending: Ending,
        /// Where the time went.
        timeline: Timeline,
    },
}

/// Turns what the client asks of its container into events, in a thread of its own.
pub fn listen(mut lifeline: UnixStream, container: Serial, sender: Sender) -> io::Result<()> {
    thread::spawn("lifeline", move || {
        while let Ok(Some(request)) = frame::read::<Request>(&mut lifeline, MAX_LIFELINE_BYTES) {
            if sender.send(Event::Request(container, request, None)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::ClientGone);
    })?;
    Ok(())
}
