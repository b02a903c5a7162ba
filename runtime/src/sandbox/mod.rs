//! The driver of a sandbox: the one thread that leads it through its life.
//!
//! ```text
//!  Plan ──► Prepared ──► Booted ──► Ready ──► (container created, started, ended) ──► Ending
//!           directory,   machine's  agent     streams attached, signals passed on
//!           sockets      process    answers
//! ```
//!
//! Each of the three holds all that was made so far and takes it down when it is dropped, so that a failure at
//! any point leaves nothing. Everything that happens meanwhile, wherever it comes from, is an [`Event`] in one
//! queue: a phase takes events until what it waits for has come, or its deadline.

mod booted;
mod ending;
mod event;
mod execs;
mod plan;
mod prepared;
mod ready;
mod request;
mod requests;
mod streams;

pub use booted::Booted;
pub use ending::{Ending, Error, Failure};
pub use event::{Event, Inbox, Sender};
pub use execs::ExecRequest;
pub use plan::{Plan, Times};
pub use prepared::Prepared;
pub use ready::{Exit, Ready};
pub use request::{Answer, Request};
pub use streams::Ends;

use crate::hooks;
use crate::state::{StateDir, Status};
use crate::timings::Timeline;

/// What the driver tells while it goes, to whoever started it.
pub trait Watcher {
    /// The machine runs.
    fn machine(&mut self, kind: sandbox_vmm_api::MachineKind, reason: &str);
    /// The container stands, and its process waits to be started.
    fn created(&mut self);
    /// The process runs.
    fn started(&mut self);
    /// Something went wrong that is no reason to end.
    fn warn(&mut self, message: &str);
}

/// Leads a sandbox through its whole life. Nothing of it is left when this returns.
pub fn run(
    plan: Plan,
    directory: StateDir,
    ends: Ends,
    inbox: &Inbox,
    watcher: &mut dyn Watcher,
    timeline: &mut Timeline,
) -> Ending {
    // A detached one is removed by somebody else.
    let gone = (!plan.detached).then(|| prepared::record_of(&plan));
    let ending = match live(plan, directory, ends, inbox, watcher, timeline) {
        Ok(Exit { status, out_of_memory }) => Ending::Exited { status, out_of_memory },
        Err(error) => Ending::of(&error),
    };
    timeline.mark("clean up");
    if let Some(record) = gone {
        for failed in hooks::run_all("poststop", &record.poststop, &record, Status::Stopped) {
            watcher.warn(&failed.to_string());
        }
    }
    ending
}

fn live(
    plan: Plan,
    directory: StateDir,
    ends: Ends,
    inbox: &Inbox,
    watcher: &mut dyn Watcher,
    timeline: &mut Timeline,
) -> Result<Exit, Error> {
    let detached = plan.detached;
    let prepared = Prepared::new(plan, directory, ends, inbox)?;
    timeline.mark("prepare");
    let booted = prepared.boot(inbox, watcher, timeline)?;
    let mut ready = booted.ready(inbox, timeline)?;
    ready.run_hooks_before()?;
    ready.create(inbox)?;
    timeline.mark("create container");
    watcher.created();
    if !detached || ready.wait_for_start(inbox)? {
        ready.start(inbox)?;
        timeline.mark("start process");
        watcher.started();
        ready.run_hooks_after_start(watcher);
        ready.tell_starter();
    }
    let exit = ready.wait(inbox)?;
    timeline.mark("run");
    ready.drain(inbox)?;
    timeline.mark("drain output");
    ready.power_off(inbox)?;
    timeline.mark("power off");
    Ok(exit)
}
