//! New limits for a container that stands or runs.
//!
//! Only what is asked for is written, but some limits share a file or are counted from one another; the half that
//! is not asked for comes from the container's configuration. If the kernel refuses anything, the limits are put
//! back, so that the configuration always says what holds.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use serde_json::Value;

use super::Container;
use super::cgroup::{Cgroup, CgroupError};
use super::limits::{self, LimitError, Setting};

/// Limits could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// They mean nothing.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The kernel refused one.
    #[error(transparent)]
    Refused(#[from] CgroupError),
    /// The container uses more, and this was to be checked.
    #[error(
        "linux.resources.memory.limit is {limit}, less than the {in_use} bytes in use, \
         and linux.resources.memory.checkBeforeUpdate forbids that"
    )]
    BelowUse {
        /// The limit asked for.
        limit: u64,
        /// What is in use.
        in_use: u64,
    },
    /// They do not fit into the configuration.
    #[error("linux.resources: cannot take the new limits into the configuration: {0}")]
    Merge(#[from] serde_json::Error),
}

impl Container {
    /// Changes its limits, all of them or none, and its configuration.
    pub fn update(&mut self, asked: &LinuxResources) -> Result<(), UpdateError> {
        let asked = asked_for(asked);
        let linux = self.spec.linux().as_ref();
        let old = linux.and_then(|linux| linux.resources().clone()).unwrap_or_default();
        let complete = complete(&asked, &old);
        let settings = limits::settings(&complete, &self.cgroup.offered())?;
        check_use(&complete, &self.cgroup)?;
        let new = merged(&old, &asked)?;
        write(&self.cgroup, &settings)?;
        if let Some(linux) = self.spec.linux_mut() {
            linux.set_resources(Some(new));
        }
        Ok(())
    }
}

/// What is asked for, without zeros that mean that nothing is, and without device rules: they stay as they were
/// made, as in runc, whose callers send them along with every update.
fn asked_for(resources: &LinuxResources) -> LinuxResources {
    let mut asked = resources.clone();
    asked.set_devices(None);
    if let Some(memory) = asked.memory_mut() {
        memory.set_limit(memory.limit().filter(|limit| *limit != 0));
        memory.set_swap(memory.swap().filter(|swap| *swap != 0));
        memory.set_reservation(memory.reservation().filter(|low| *low != 0));
    }
    if let Some(cpu) = asked.cpu_mut() {
        cpu.set_shares(cpu.shares().filter(|shares| *shares != 0));
        cpu.set_quota(cpu.quota().filter(|quota| *quota != 0));
        cpu.set_period(cpu.period().filter(|period| *period != 0));
    }
    asked
}

/// Adds the other half of what belongs together: memory and swap, quota and period.
fn complete(asked: &LinuxResources, old: &LinuxResources) -> LinuxResources {
    let mut complete = asked.clone();
    let old_memory = old.memory().unwrap_or_default();
    if let Some(memory) = complete.memory_mut() {
        complete_memory(memory, &old_memory);
    }
    if let (Some(cpu), Some(old)) = (complete.cpu_mut(), old.cpu()) {
        complete_cpu(cpu, old);
    }
    complete
}

fn complete_memory(memory: &mut LinuxMemory, old: &LinuxMemory) {
    if memory.limit().is_some() || memory.swap().is_some() {
        memory.set_limit(memory.limit().or(old.limit()));
        memory.set_swap(memory.swap().or(old.swap()));
    }
}

fn complete_cpu(cpu: &mut LinuxCpu, old: &LinuxCpu) {
    if cpu.quota().is_some() || cpu.period().is_some() {
        cpu.set_quota(cpu.quota().or(old.quota()));
        cpu.set_period(cpu.period().or(old.period()));
    }
}

fn check_use(asked: &LinuxResources, cgroup: &Cgroup) -> Result<(), UpdateError> {
    let memory = asked.memory().unwrap_or_default();
    let Some(Ok(limit)) = memory.limit().map(u64::try_from) else { return Ok(()) };
    match cgroup.memory_in_use() {
        Some(in_use) if memory.check_before_update() == Some(true) && in_use > limit => {
            Err(UpdateError::BelowUse { limit, in_use })
        }
        _ => Ok(()),
    }
}

/// The old limits with the new ones in their place.
fn merged(old: &LinuxResources, new: &LinuxResources) -> Result<LinuxResources, serde_json::Error> {
    let mut both = serde_json::to_value(old)?;
    overlay(&mut both, serde_json::to_value(new)?);
    serde_json::from_value(both)
}

fn overlay(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                overlay(under.entry(key).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}

/// Writes all settings; if one is refused, puts back what was there.
fn write(cgroup: &Cgroup, settings: &[Setting]) -> Result<(), CgroupError> {
    let before: Vec<Option<String>> = settings.iter().map(|setting| cgroup.read(&setting.file)).collect();
    let written = write_in_any_order(cgroup, settings);
    if written.is_err() {
        let old = settings.iter().zip(before).filter_map(|(setting, value)| {
            let value = setting.undo(&value?);
            Some(Setting { file: setting.file.clone(), value, field: setting.field.clone() })
        });
        // Nothing is left to be done where the kernel does not take its own words back.
        let _ = write_in_any_order(cgroup, &old.collect::<Vec<_>>());
    }
    written
}

/// One setting may be refused until another is written, a burst above the old quota for one, or a weight while the
/// cgroup is idle. So those that are refused are tried once more after the others.
fn write_in_any_order(cgroup: &Cgroup, settings: &[Setting]) -> Result<(), CgroupError> {
    let refused: Vec<&Setting> = settings.iter().filter(|setting| cgroup.set(setting).is_err()).collect();
    let again: Vec<_> = refused.into_iter().map(|setting| cgroup.set(setting)).collect();
    again.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    fn written(old: &str, asked: &str) -> Result<Vec<(String, String)>, LimitError> {
        let complete = complete(&asked_for(&resources(asked)), &resources(old));
        Ok(limits::settings(&complete, &limits::Offered::default())?
            .into_iter()
            .map(|s| (s.file, s.value))
            .collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(file, value)| (file.to_string(), value.to_string())).collect()
    }

    const OLD: &str = r#"{
        "memory": {"limit": 100, "swap": 150, "reservation": 10},
        "cpu": {"quota": 50000, "period": 200000, "shares": 512, "idle": 1},
        "pids": {"limit": 20},
        "devices": [{"allow": false}]
    }"#;

    #[test]
    fn only_what_is_asked_for_is_written() {
        assert_eq!(written(OLD, "{}").unwrap(), []);
        assert_eq!(written(OLD, r#"{"pids": {"limit": 30}}"#).unwrap(), pairs(&[("pids.max", "30")]));
        let idle = written(OLD, r#"{"cpu": {"idle": 0, "burst": 0}}"#).unwrap();
        assert_eq!(idle, pairs(&[("cpu.idle", "0"), ("cpu.max.burst", "0")]));
        let unset = r#"{"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0}}"#;
        assert_eq!(written(OLD, unset).unwrap(), []);
    }

    #[test]
    fn what_belongs_together_is_completed_from_the_configuration() {
        let cpu = |asked: &str| written(OLD, &format!(r#"{{"cpu": {asked}}}"#)).unwrap();
        assert_eq!(cpu(r#"{"quota": 7000}"#), pairs(&[("cpu.max", "7000 200000")]));
        assert_eq!(cpu(r#"{"period": 100000, "quota": 0}"#), pairs(&[("cpu.max", "50000 100000")]));
        let memory = |asked: &str| written(OLD, &format!(r#"{{"memory": {asked}}}"#));
        let both = |limit, swap| Ok(pairs(&[("memory.max", limit), ("memory.swap.max", swap)]));
        assert_eq!(memory(r#"{"limit": 120}"#), both("120", "30"));
        assert_eq!(memory(r#"{"swap": 300}"#), both("100", "200"));
        assert_eq!(memory(r#"{"limit": 200}"#), Err(LimitError::SwapBelowMemory { swap: 150, limit: 200 }));
        assert_eq!(memory(r#"{"reservation": 20}"#), Ok(pairs(&[("memory.low", "20")])));
    }

    #[test]
    fn the_configuration_takes_what_was_asked_for() {
        let asked = asked_for(&resources(
            r#"{"memory": {"limit": 120, "swap": 0}, "cpu": {"idle": 0}, "unified": {"memory.high": "110"},
                "devices": [{"allow": true}]}"#,
        ));
        let expected = resources(
            r#"{"memory": {"limit": 120, "swap": 150, "reservation": 10},
                "cpu": {"quota": 50000, "period": 200000, "shares": 512, "idle": 0},
                "pids": {"limit": 20}, "unified": {"memory.high": "110"}, "devices": [{"allow": false}]}"#,
        );
        assert_eq!(merged(&resources(OLD), &asked).unwrap(), expected);
    }
}
