//! `linux.resources`, as what is written to the files of a cgroup of version 2.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice,
};

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
    #[error("linux.resources.unified.{0}: it is not the name of a cgroup file, such as memory.high")]
    UnifiedName(String),
    /// The file belongs to no controller of the guest.
    #[error(
        "linux.resources.unified.{file}: the guest's kernel has no such controller: it has {controllers}"
    )]
    NoController {
        /// The file.
        file: String,
        /// What the guest has.
        controllers: String,
    },
    /// The file is not a limit: the agent itself needs it.
    #[error("linux.resources.unified.{0}: it is no limit: the sandbox uses it to run the container")]
    Reserved(String),
    /// The size of a page is none.
    #[error("{field}: {size:?} is not a size of pages, such as 2MB")]
    PageSize {
        /// Where in config.json it stands.
        field: String,
        /// What stands there.
        size: String,
    },
}

/// What is written to a file of a cgroup.
#[derive(Debug, PartialEq)]
pub struct Setting {
    /// The file.
    pub file: String,
    /// The text.
    pub value: String,
    /// Where in config.json it comes from.
    pub field: String,
}

impl Setting {
    /// The text that puts the file back to what it was; `before` is what could be read then.
    ///
    /// A file with a line for each device takes one line at a time.
    pub fn undo(&self, before: &str) -> String {
        let key = self.value.split_whitespace().next().unwrap_or_default();
        let line = |key: &str| before.lines().find(|line| line.split_whitespace().next() == Some(key));
        match self.file.as_str() {
            THROTTLE_FILE => line(key)
                .map_or_else(|| format!("{key} rbps=max wbps=max riops=max wiops=max"), str::to_owned),
            WEIGHT_FILE | BFQ_WEIGHT_FILE if key.contains(':') => {
                line(key).map_or_else(|| format!("{key} default"), str::to_owned)
            }
            WEIGHT_FILE | BFQ_WEIGHT_FILE => line("default").unwrap_or(before).to_owned(),
            _ => before.to_owned(),
        }
    }
}

const THROTTLE_FILE: &str = "io.max";
const WEIGHT_FILE: &str = "io.weight";

/// The weight of the scheduler for disks that not every kernel has.
pub const BFQ_WEIGHT_FILE: &str = "io.bfq.weight";

/// What the guest's kernel offers to a cgroup.
#[derive(Debug, Default)]
pub struct Offered {
    /// The controllers, in the words of `cgroup.controllers`.
    pub controllers: String,
    /// Whether weights are those of the BFQ scheduler.
    pub bfq: bool,
}

/// Translates the configured limits.
pub fn settings(resources: &LinuxResources, offered: &Offered) -> Result<Vec<Setting>, LimitError> {
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
    all.hugepages(resources.hugepage_limits().as_deref().unwrap_or_default())?;
    if let Some(block) = resources.block_io() {
        all.block(block, offered.bfq);
    }
    if let Some(unified) = resources.unified() {
        all.unified(unified, &offered.controllers)?;
    }
    Ok(all.0)
}

struct Settings(Vec<Setting>);

impl Settings {
    fn add(&mut self, file: &str, value: Option<impl ToString>, field: &str) {
        if let Some(value) = value {
            self.0.push(Setting { file: file.to_owned(), value: value.to_string(), field: field.to_owned() });
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

    /// Pages that are in use, and pages that are promised.
    fn hugepages(&mut self, limits: &[LinuxHugepageLimit]) -> Result<(), LimitError> {
        for (index, limit) in limits.iter().enumerate() {
            let field = format!("linux.resources.hugepageLimits[{index}]");
            let size = limit.page_size();
            if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return Err(LimitError::PageSize { field: format!("{field}.pageSize"), size: size.clone() });
            }
            for file in ["max", "rsvd.max"] {
                self.add(&format!("hugetlb.{size}.{file}"), Some(limit.limit()), &field);
            }
        }
        Ok(())
    }

    fn block(&mut self, block: &LinuxBlockIo, bfq: bool) {
        let field = |name: &str| format!("linux.resources.blockIO.{name}");
        let file = if bfq { BFQ_WEIGHT_FILE } else { WEIGHT_FILE };
        let scaled = |weight: u16| if bfq { weight.into() } else { weight_of_blkio(weight) };
        let weight = block.weight().filter(|weight| *weight != 0);
        self.add(file, weight.map(scaled), &field("weight"));
        for (index, device) in block.weight_device().iter().flatten().enumerate() {
            let weight = device.weight().filter(|weight| *weight != 0);
            let line = weight.map(|w| format!("{}:{} {}", device.major(), device.minor(), scaled(w)));
            self.add(file, line, &field(&format!("weightDevice[{index}]")));
        }
        for (name, key, devices) in [
            ("throttleReadBpsDevice", "rbps", block.throttle_read_bps_device()),
            ("throttleWriteBpsDevice", "wbps", block.throttle_write_bps_device()),
            ("throttleReadIOPSDevice", "riops", block.throttle_read_iops_device()),
            ("throttleWriteIOPSDevice", "wiops", block.throttle_write_iops_device()),
        ] {
            for (index, device) in devices.iter().flatten().enumerate() {
                self.add(THROTTLE_FILE, Some(throttle(device, key)), &field(&format!("{name}[{index}]")));
            }
        }
    }

    fn unified(&mut self, unified: &HashMap<String, String>, controllers: &str) -> Result<(), LimitError> {
        let mut files: Vec<_> = unified.iter().collect();
        files.sort_unstable();
        for (file, value) in files {
            let plain = file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            let controller = match file.split_once('.') {
                Some((controller, name)) if plain && !controller.is_empty() && !name.is_empty() => controller,
                _ => return Err(LimitError::UnifiedName(file.clone())),
            };
            if controller == "cgroup" && !CORE_LIMITS.contains(&file.as_str()) {
                return Err(LimitError::Reserved(file.clone()));
            }
            if controller != "cgroup" && !controllers.split_whitespace().any(|known| known == controller) {
                let controllers = controllers.trim().to_owned();
                return Err(LimitError::NoController { file: file.clone(), controllers });
            }
            self.add(file, Some(value), &format!("linux.resources.unified.{file}"));
        }
        Ok(())
    }
}

/// The files that belong to no controller and are limits all the same.
const CORE_LIMITS: [&str; 2] = ["cgroup.max.depth", "cgroup.max.descendants"];

/// One limit of one device. No rate at all is no limit.
fn throttle(device: &LinuxThrottleDevice, key: &str) -> String {
    let rate = match device.rate() {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    format!("{}:{} {key}={rate}", device.major(), device.minor())
}

/// Weights of 10 to 1000 become weights of 1 to 10000, as in runc.
fn weight_of_blkio(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9_999 / 990
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
        let offered = Offered { controllers: "cpuset memory\n".into(), bfq: false };
        Ok(settings(&resources, &offered)?.into_iter().map(|s| (s.file, s.value)).collect())
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
        let unified = |file: &str| written(&format!(r#"{{"unified": {{"{file}": "1"}}}}"#));
        assert_eq!(unified("memory.high").unwrap(), pairs(&[("memory.high", "1")]));
        assert_eq!(unified("cgroup.max.depth").unwrap(), pairs(&[("cgroup.max.depth", "1")]));
        for bad in ["../memory.max", "memory./x", "a/b.c", ".x", "tasks", "memory."] {
            assert_eq!(unified(bad), Err(LimitError::UnifiedName(bad.into())));
        }
        assert_eq!(unified("cgroup.freeze"), Err(LimitError::Reserved("cgroup.freeze".into())));
        let message = unified("disk.max").unwrap_err().to_string();
        assert!(message.starts_with("linux.resources.unified.disk.max: "), "{message}");
        assert!(message.ends_with("it has cpuset memory"), "{message}");
    }

    #[test]
    fn huge_pages_are_limited_in_use_and_as_promised() {
        let got = written(r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}"#).unwrap();
        assert_eq!(got, pairs(&[("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")]));
        let bad = written(r#"{"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]}"#).unwrap_err();
        assert!(bad.to_string().starts_with("linux.resources.hugepageLimits[0].pageSize: "), "{bad}");
    }

    const BLOCK: &str = r#"{"blockIO": {"weight": 10, "weightDevice": [{"major": 7, "minor": 0, "weight": 1000}],
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}],
        "throttleWriteBpsDevice": [{"major": 8, "minor": 1, "rate": 0}],
        "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 6}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 7}]}}"#;

    #[test]
    fn weights_and_throttles_of_devices() {
        let expected = pairs(&[
            ("io.weight", "1"),
            ("io.weight", "7:0 10000"),
            ("io.max", "8:0 rbps=5"),
            ("io.max", "8:1 wbps=max"),
            ("io.max", "8:0 riops=6"),
            ("io.max", "8:0 wiops=7"),
        ]);
        assert_eq!(written(BLOCK).unwrap(), expected);
        let resources: LinuxResources = serde_json::from_str(BLOCK).unwrap();
        let bfq = settings(&resources, &Offered { bfq: true, ..Offered::default() }).unwrap();
        assert_eq!((bfq[1].file.as_str(), bfq[1].value.as_str()), (BFQ_WEIGHT_FILE, "7:0 1000"));
        assert_eq!(bfq[4].field, "linux.resources.blockIO.throttleReadIOPSDevice[0]");
    }

    #[test]
    fn a_device_is_put_back_by_its_own_line() {
        let setting = |file: &str, value: &str| Setting {
            file: file.into(),
            value: value.into(),
            field: String::new(),
        };
        let throttle = setting("io.max", "8:0 rbps=5");
        assert_eq!(throttle.undo("7:0 rbps=1\n8:0 rbps=9 wbps=max\n"), "8:0 rbps=9 wbps=max");
        assert_eq!(throttle.undo(""), "8:0 rbps=max wbps=max riops=max wiops=max");
        let weights = "default 50\n8:0 70\n";
        assert_eq!(setting("io.weight", "3").undo(weights), "default 50");
        assert_eq!(setting("io.weight", "8:0 3").undo(weights), "8:0 70");
        assert_eq!(setting("io.weight", "8:1 3").undo(weights), "8:1 default");
        assert_eq!(setting("memory.max", "3").undo("max\n"), "max\n");
    }
}
