//! Containers that stand still.
//!
//! ```text
//!           pause                 frozen 1
//! running ───────► turn: Paused ───────────► paused
//!    ▲  ▲               │                      │ resume
//!    │  └── too long ───┘      frozen 0        ▼
//!    └─────────────────────────────────── turn: Running
//! ```
//!
//! The kernel holds the processes of a cgroup one by one, each where it next leaves the kernel, so a pause takes
//! its time. `cgroup.events` tells when the last one stands; the request is answered then. Whether a container
//! is paused is known to the kernel alone (`cgroup.freeze`); here is only who waits for a turn.

use std::time::{Duration, Instant};

use sandbox_protocol::{Failure, Outcome};

use crate::container::Container;
use crate::process::Stage;
use crate::requests::{not_found, other};
use crate::serve::{Agent, ServeError};

/// How long the processes of a container may take to come to rest. A process that waits for a file of the share
/// stands only when the host has answered.
const TURN_LIMIT: Duration = Duration::from_secs(10);

/// What a container turns to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum To {
    Paused,
    Running,
}

/// A container on its way to a pause, or out of one.
#[derive(Debug)]
pub struct Turn {
    /// The request that waits for it.
    request: u64,
    to: To,
    limit: Instant,
}

impl Agent {
    /// Has a container stand still; the answer comes when it does.
    pub(crate) fn pause(&mut self, request: u64, id: &str) -> Result<(), Failure> {
        match self.running(id)?.cgroup.is_held() {
            true => Err(other(format!("the container {id:?} is paused already"))),
            false => self.turn(request, id, To::Paused),
        }
    }

    /// Lets a container go on; the answer comes when it does.
    pub(crate) fn resume(&mut self, request: u64, id: &str) -> Result<(), Failure> {
        match self.running(id)?.cgroup.is_held() {
            true => self.turn(request, id, To::Running),
            false => Err(other(format!("the container {id:?} is not paused"))),
        }
    }

    fn turn(&mut self, request: u64, id: &str, to: To) -> Result<(), Failure> {
        let container = self.running(id)?;
        if container.turn.is_some() {
            return Err(other(format!("the container {id:?} is being paused or resumed: wait for that")));
        }
        self.watch_cgroup(&container.cgroup).map_err(other)?;
        container.cgroup.hold(to == To::Paused).map_err(other)?;
        if let Some(container) = self.containers.get_mut(id) {
            container.turn = Some(Turn { request, to, limit: Instant::now() + TURN_LIMIT });
        }
        Ok(())
    }

    /// A container whose first process executes its program.
    fn running(&self, id: &str) -> Result<&Container, Failure> {
        let container = self.container(id)?;
        match self.processes.get(&container.init).map(|init| init.stage) {
            Some(Stage::Running) => Ok(container),
            _ => Err(not_found(format!("the container {id:?} is not running"))),
        }
    }

    /// When the first of the turns has taken too long.
    pub(crate) fn next_turn_limit(&self) -> Option<Instant> {
        self.containers.values().filter_map(|c| c.turn.as_ref()).map(|turn| turn.limit).min()
    }

    /// Answers the requests whose containers have turned, or will not.
    pub(crate) fn settle_turns(&mut self) -> Result<(), ServeError> {
        let turning = self.containers.iter().filter(|(_, c)| c.turn.is_some());
        let settled: Vec<(String, Outcome)> =
            turning.filter_map(|(id, c)| Some((id.clone(), self.settled(id, c)?))).collect();
        for (id, outcome) in settled {
            if let Some(turn) = self.containers.get_mut(&id).and_then(|c| c.turn.take()) {
                self.reply(turn.request, outcome)?;
            }
        }
        Ok(())
    }

    fn settled(&self, id: &str, container: &Container) -> Option<Outcome> {
        let turn = container.turn.as_ref()?;
        if self.running(id).is_err() {
            return Some(Outcome::Failed(not_found(format!("the container {id:?} has ended"))));
        }
        if container.cgroup.is_frozen() == (turn.to == To::Paused) {
            return Some(Outcome::Done);
        }
        (Instant::now() >= turn.limit).then(|| Outcome::Failed(too_long(id, container, turn.to)))
    }
}

/// A container that does not come to rest goes on.
fn too_long(id: &str, container: &Container, to: To) -> Failure {
    let seconds = TURN_LIMIT.as_secs();
    match (to, container.cgroup.hold(false)) {
        (To::Paused, Ok(())) => other(format!(
            "cannot pause the container {id:?}: a process of it has not come to rest within {seconds} s, \
             perhaps since it waits for a file; it goes on"
        )),
        (_, Err(e)) => other(format!("cannot let the container {id:?} go on: {e}")),
        (To::Running, Ok(())) => {
            other(format!("the container {id:?} is resumed but has not gone on within {seconds} s"))
        }
    }
}
