//! The driver of a sandbox: the one thread that leads it through its life.
//!
//! ```text
//!  Plan ──► Prepared ──► Booted ──► Ready ──► (containers are made, run, leave; the first has ended) ──► Ending
//!           directory,   machine's  agent
//!           sockets      process    answers
//! ```
//!
//! Each of the three holds all that was made so far and takes it down when it is dropped, so that a failure at
//! any point leaves nothing. Everything that happens meanwhile, wherever it comes from, is an [`Event`] in one
//! queue: a phase takes events until what it waits for has come, or its deadline.
//!
//! A sandbox holds containers, each with a life of its own ([`container`]). The first one comes with it and ends it;
//! the others, those of a pod, come and go while it runs.

mod booted;
mod container;
mod ending;
mod event;
mod execs;
mod forwards;
mod lives;
mod oom_kills;
mod plan;
mod prepared;
mod ready;
mod request;
mod requests;
mod streams;

pub use booted::Booted;
pub use container::{Claimed, Newcomer, Serial};
pub use ending::{Ending, Error, Failure};
pub use event::{Event, Inbox, Sender, Work};
pub use execs::ExecRequest;
pub use plan::{ContainerPlan, Home, MachinePlan, Plan, PodPlan, Times};
pub use prepared::Prepared;
pub use ready::{Exit, Ready};
pub use request::{Answer, Request};
pub use streams::Ends;

use crate::hooks;
use crate::state::Status;
use crate::timings::Timeline;

/// What the driver tells while it goes, to whoever started it.
pub trait Watcher {
    /// The machine runs.
    fn machine(&mut self, kind: sandbox_vmm_api::MachineKind, reason: &str);
    /// The first container stands, and its process waits to be started.
    fn created(&mut self);
    /// The process of the first container runs.
    fn started(&mut self);
    /// Something went wrong that is no reason to end.
    fn warn(&mut self, message: &str);
}

/// Leads a sandbox through its whole life. Nothing of it is left when this returns.
pub fn run(
    machine: MachinePlan,
    first: Claimed,
    ends: Ends,
    inbox: &Inbox,
    watcher: &mut dyn Watcher,
    timeline: &mut Timeline,
) -> Ending {
    // A detached one is removed by somebody else.
    let gone = (!first.plan.detached).then(|| first.plan.record(None));
    let ending = match live(machine, first, ends, inbox, watcher, timeline) {
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
    machine: MachinePlan,
    first: Claimed,
    ends: Ends,
    inbox: &Inbox,
    watcher: &mut dyn Watcher,
    timeline: &mut Timeline,
) -> Result<Exit, Error> {
    let prepared = Prepared::new(machine, first, ends, inbox)?;
    timeline.mark("prepare");
    let booted = prepared.boot(inbox, watcher, timeline)?;
    let mut ready = booted.ready(inbox, watcher, timeline)?;
    let exit = ready.lead().inspect_err(|error| ready.refuse_all(error))?;
    ready.power_off()?;
    Ok(exit)
}
