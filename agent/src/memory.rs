//! Kills for lack of memory, told as they happen.
//!
//! The kernel counts them in the container's `memory.events` before it kills, and signals a change of that file, at most
//! every 10 ms. What is killed may be any process of the container, which need not end of it.

use sandbox_protocol::{Event, FromAgent};

use crate::process::Serial;
use crate::serve::{Agent, ServeError};

impl Agent {
    /// The counts of the container whose first process this is have changed.
    pub(crate) fn memory_changed(&mut self, init: Serial) -> Result<(), ServeError> {
        let owner = self.containers.iter().find(|(_, container)| container.init == init);
        let Some(id) = owner.map(|(id, _)| id.clone()) else { return Ok(()) };
        self.tell_of_kills(&id)
    }

    /// Tells the host of kills that it does not know of, however many.
    pub(crate) fn tell_of_kills(&mut self, id: &str) -> Result<(), ServeError> {
        let Some(container) = self.containers.get_mut(id) else { return Ok(()) };
        let kills = container.cgroup.oom_kills();
        if kills <= container.oom_kills_told {
            return Ok(());
        }
        container.oom_kills_told = kills;
        Ok(self.control.send(&FromAgent::Event(Event::OutOfMemory { container: id.to_owned() }))?)
    }
}
