//! `state.json`: what a sandbox shows of itself to other commands.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use oci_spec::runtime::Hook;
use sandbox_vmm_api::MachineKind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{SandboxId, Status};
use crate::cgroup::Cgroup;
use crate::network;

/// The version of the OCI runtime specification that `state.json` and `sandbox spec` follow.
pub const OCI_VERSION: &str = "1.2.1";

/// A sandbox's record. The fields down to `annotations` are those of the OCI state.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// [`OCI_VERSION`].
    pub oci_version: String,
    /// The sandbox's id.
    pub id: SandboxId,
    /// What it is doing.
    pub status: Status,
    /// The process id on the host of what stands for the container: the monitor, or its parent.
    pub pid: u32,
    /// The bundle, absolute.
    pub bundle: PathBuf,
    /// The root file system, absolute.
    #[serde(default)]
    pub rootfs: PathBuf,
    /// The cgroup of the host that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cgroup>,
    /// Its network.
    #[serde(default)]
    pub network: network::Wanted,
    /// The container in whose machine it lives, where that is not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxId>,
    /// The annotations of the configuration.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// When it was made, RFC 3339 in UTC.
    pub created: String,
    /// The machine it runs on, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineKind>,
    /// The machine's process id on the host, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_pid: Option<u32>,
    /// The hooks to run when it has been removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
    /// Whether it stays after the sandbox's end, until it is deleted.
    #[serde(default)]
    pub kept: bool,
    /// Whether the memory limit killed something in it, once it has ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub out_of_memory: bool,
}

impl Record {
    /// The state as the OCI specification lays it out (runtime.md, "State"), for hooks and for `sandbox state`.
    pub fn oci_state(&self, status: Status) -> Value {
        json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "pid": self.pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
    }

    /// A record for tests.
    #[cfg(test)]
    pub fn for_tests(id: &str) -> Self {
        Self {
            oci_version: OCI_VERSION.into(),
            id: id.parse().unwrap(),
            status: Status::Running,
            pid: 1,
            bundle: "/".into(),
            rootfs: "/rootfs".into(),
            cgroup: None,
            network: network::Wanted::Loopback,
            sandbox: None,
            annotations: BTreeMap::new(),
            created: String::new(),
            machine: None,
            machine_pid: None,
            poststop: Vec::new(),
            kept: false,
            out_of_memory: false,
        }
    }
}

/// A time as RFC 3339 in UTC with microseconds, as runc writes it.
pub fn rfc3339(time: SystemTime) -> String {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since_epoch.as_secs() / 86_400, since_epoch.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since_epoch.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// The date of a day since 1970-01-01, by the algorithm of Howard Hinnant's `civil_from_days`: years are
/// counted from March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
