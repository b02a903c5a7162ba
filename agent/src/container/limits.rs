//! `linux.resources`, as what is written to the files of a cgroup of version 2.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

/// The file of the limit on swap, which a kernel without swap does not have.
pub const SWAP_FILE: &str = "memory.swap.max";

/// The period of CPU bandwidth where the configuration has none, in microseconds: the kernel's own.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// A limit that means nothing.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LimitError {
    /// Memory and swap together cannot be less than memory.
    #[error(
        "linux.resources.memory.swap is {swap}, less than linux.resources.memory.limit, {limit}: \
         it is the limit of both together"
    )]
    SwapBelowMemory {
        /// The limit of both.
        swap: i64,
        /// The limit of memory.
        limit: i64,
    },
    /// A swap limit says nothing without a memory limit.
    #[error("linux.resources.memory.swap needs linux.resources.memory.limit")]
    SwapWithoutMemory,
    /// The name is not that of a file of a cgroup.
    #[error("linux.resources.unified: {0:?} is not the name of a cgroup file")]
    UnifiedName(String),
}

/// What is written to a file of a cgroup.
#[derive(Debug, PartialEq)]
pub struct Setting {
    /// The file.
    pub file: String,
    /// The text.
    pub value: String,
    /// Where in config.json it comes from.
    pub field: &'static str,
}

/// Translates the configured limits.
pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, LimitError> {
    let mut all = Settings(Vec::new());
    if let Some(memory) = resources.memory() {
        all.memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        all.cpu(cpu);
    }
    if let Some(pids) = resources.pids() {
        all.add("pids.max", Some(max_if(pids.limit(), pids.limit() <= 0)), "linux.resources.pids.limit");
    }
    for (file, value) in resources.unified().iter().flatten() {
        let plain =
            file.contains('.') && file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain || file.starts_with('.') {
            return Err(LimitError::UnifiedName(file.clone()));
        }
        all.add(file, Some(value.clone()), "linux.resources.unified");
    }
    Ok(all.0)
}

struct Settings(Vec<Setting>);

impl Settings {
    fn add(&mut self, file: &str, value: Option<impl ToString>, field: &'static str) {
        if let Some(value) = value {
            self.0.push(Setting { file: file.to_owned(), value: value.to_string(), field });
        }
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), LimitError> {
        let limit = memory.limit().filter(|limit| *limit != 0);
        let swap = memory.swap().filter(|swap| *swap != 0);
        let reservation = memory.reservation().filter(|low| *low != 0);
        self.add("memory.max", limit.map(|l| max_if(l, l < 0)), "linux.resources.memory.limit");
        self.add("memory.low", reservation.map(|r| max_if(r, r < 0)), "linux.resources.memory.reservation");
        self.add(SWAP_FILE, swap_alone(limit, swap)?, "linux.resources.memory.swap");
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) {
        let weight = cpu.shares().filter(|shares| *shares != 0).map(weight_of_shares);
        self.add("cpu.weight", weight, "linux.resources.cpu.shares");
        self.add("cpu.idle", cpu.idle(), "linux.resources.cpu.idle");
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        let field = match (quota, period) {
            (None, Some(_)) => "linux.resources.cpu.period",
            (_, None) => "linux.resources.cpu.quota",
            (Some(_), Some(_)) => "linux.resources.cpu.quota with linux.resources.cpu.period",
        };
        if quota.is_some() || period.is_some() {
            let quota = quota.map_or("max".to_owned(), |q| max_if(q, q < 0));
            let bandwidth = format!("{quota} {}", period.unwrap_or(DEFAULT_PERIOD_US));
            self.add("cpu.max", Some(bandwidth), field);
        }
        self.add("cpu.max.burst", cpu.burst(), "linux.resources.cpu.burst");
        self.add("cpuset.cpus", some_text(cpu.cpus()), "linux.resources.cpu.cpus");
        self.add("cpuset.mems", some_text(cpu.mems()), "linux.resources.cpu.mems");
    }
}

fn max_if(value: i64, unlimited: bool) -> String {
    if unlimited { "max".to_owned() } else { value.to_string() }
}

fn some_text(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

/// The configuration limits memory and swap together, the kernel swap alone.
fn swap_alone(limit: Option<i64>, swap: Option<i64>) -> Result<Option<String>, LimitError> {
    match (limit, swap) {
        (_, None) => Ok(None),
        (_, Some(..=-1)) => Ok(Some("max".to_owned())),
        (None | Some(..=-1), Some(_)) => Err(LimitError::SwapWithoutMemory),
        (Some(limit), Some(swap)) if swap < limit => Err(LimitError::SwapBelowMemory { swap, limit }),
        (Some(limit), Some(swap)) => Ok(Some((swap - limit).to_string())),
    }
}

/// Shares of 2 to 262144 (1024 is the default) become weights of 1 to 10000, as in runc.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(json: &str) -> Result<Vec<(String, String)>, LimitError> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        Ok(settings(&resources)?.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(file, value)| (file.to_string(), value.to_string())).collect()
    }

    #[test]
    fn memory_and_swap_are_told_apart() {
        let got = written(r#"{"memory": {"limit": 100, "swap": 150, "reservation": 50}}"#).unwrap();
        assert_eq!(got, pairs(&[("memory.max", "100"), ("memory.low", "50"), ("memory.swap.max", "50")]));
        let got = written(r#"{"memory": {"limit": -1, "swap": -1}}"#).unwrap();
        assert_eq!(got, pairs(&[("memory.max", "max"), ("memory.swap.max", "max")]));
        let low = written(r#"{"memory": {"limit": 100, "swap": 50}}"#);
        assert_eq!(low, Err(LimitError::SwapBelowMemory { swap: 50, limit: 100 }));
        assert_eq!(written(r#"{"memory": {"swap": 50}}"#), Err(LimitError::SwapWithoutMemory));
    }

    #[test]
    fn cpu_settings_take_the_forms_of_version_2() {
        let got = written(r#"{"cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1"}}"#);
        let want = [("cpu.weight", "39"), ("cpu.max", "50000 100000"), ("cpuset.cpus", "0-1")];
        assert_eq!(got.unwrap(), pairs(&want));
        assert_eq!(written(r#"{"cpu": {"quota": -1}}"#).unwrap(), pairs(&[("cpu.max", "max 100000")]));
        assert_eq!(
            (weight_of_shares(2), weight_of_shares(262_144), weight_of_shares(u64::MAX)),
            (1, 10_000, 10_000)
        );
    }

    #[test]
    fn pids_without_a_positive_limit_are_unlimited() {
        assert_eq!(written(r#"{"pids": {"limit": 20}}"#).unwrap(), pairs(&[("pids.max", "20")]));
        assert_eq!(written(r#"{"pids": {"limit": -1}}"#).unwrap(), pairs(&[("pids.max", "max")]));
    }

    #[test]
    fn a_unified_name_is_no_path() {
        assert!(written(r#"{"unified": {"memory.high": "1"}}"#).is_ok());
        for bad in ["../memory.max", "a/b.c", ".x", "tasks"] {
            let json = format!(r#"{{"unified": {{"{bad}": "1"}}}}"#);
            assert_eq!(written(&json), Err(LimitError::UnifiedName(bad.into())));
        }
    }
}
