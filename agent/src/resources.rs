//! What a container may use, and what it does use.

use oci_spec::runtime::LinuxResources;
use sandbox_protocol::{Failure, Outcome};

use crate::container::{processes, stats};
use crate::requests::{not_found, other};
use crate::serve::Agent;

impl Agent {
    /// Changes the limits of a container.
    pub(crate) fn update(&mut self, id: &str, resources: &LinuxResources) -> Result<(), Failure> {
        let init = self.container(id)?.init;
        let lives = self.processes.get(&init).is_some_and(|init| !init.has_ended());
        match self.containers.get_mut(id) {
            Some(container) if lives => container.update(resources).map_err(other),
            _ => Err(not_found(format!("the container {id:?} has stopped"))),
        }
    }

    /// Lists the processes of a container.
    pub(crate) fn processes(&self, id: &str) -> Result<Outcome, Failure> {
        processes::read(self.container(id)?.cgroup.path()).map(Outcome::Processes).map_err(other)
    }

    /// Reads what a container uses.
    pub(crate) fn stats(&self, id: &str) -> Result<Outcome, Failure> {
        Ok(Outcome::Stats(Box::new(stats::read(self.container(id)?.cgroup.path()))))
    }
}
