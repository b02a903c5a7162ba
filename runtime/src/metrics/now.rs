//! What there is at the moment: sandboxes, by their records, and what their machines say when they are asked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sandbox_vmm_api::{ControlReply, ControlRequest, MachineKind, Statistics};

use super::text::{Metric, Text};
use crate::state::{NAMESPACE_MARK, Record, StateDirPaths, StateError, Status, list};
use crate::vmm_control;

/// How long a machine may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// The annotations that name a pod.
const POD: &str = "io.kubernetes.cri.sandbox-name";
const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

const INFO: Metric = Metric {
    name: "sandbox_info",
    kind: "gauge",
    help: "1 for each sandbox, with its machine, its status and its pod.",
};
const CONTAINERS: Metric =
    Metric { name: "sandbox_containers", kind: "gauge", help: "Containers that have not ended." };
const ANSWERS: Metric =
    Metric { name: "sandbox_machine_up", kind: "gauge", help: "Whether the machine answers." };
const RESIDENT: Metric = Metric {
    name: "sandbox_memory_resident_bytes",
    kind: "gauge",
    help: "Guest memory that is resident on the host.",
};
const REPORTED: Metric = Metric {
    name: "sandbox_memory_reported_bytes_total",
    kind: "counter",
    help: "Memory that the guest has given back.",
};
const EXITS: Metric =
    Metric { name: "sandbox_vcpu_exits_total", kind: "counter", help: "Exits of vCPUs (KVM only)." };
const DEVICES: Metric = Metric {
    name: "sandbox_device_total",
    kind: "counter",
    help: "Counters of a machine's devices, each by its name.",
};

/// A state root, and those of containerd's namespaces below it.
pub fn roots(root: &Path) -> Result<Vec<PathBuf>, StateError> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| StateError::Read { path: root.into(), error })?,
    };
    let paths =
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(NAMESPACE_MARK));
    let mut below: Vec<PathBuf> = paths.map(|entry| entry.path()).collect();
    below.sort();
    below.insert(0, root.into());
    Ok(below)
}

/// Writes what there is below one root.
pub fn write(root: &Path, text: &mut Text) -> Result<(), StateError> {
    let name = root.file_name().unwrap_or_default().to_string_lossy();
    let namespace = name.strip_prefix(NAMESPACE_MARK).unwrap_or_default();
    // A record that cannot be read is for `sandbox list` to complain about.
    let (records, _) = list(root)?;
    for record in records.iter().filter(|record| record.sandbox.is_none()) {
        let id = record.id.as_str();
        let labels = [("sandbox", id), ("namespace", namespace)];
        let of = |name: &str| record.annotations.get(name).map_or("", String::as_str);
        let machine = record.machine.map_or("", MachineKind::name);
        let about = [
            ("machine", machine),
            ("status", record.status.name()),
            ("pod", of(POD)),
            ("pod_namespace", of(POD_NAMESPACE)),
        ];
        text.add(INFO, &[&labels[..], &about].concat(), 1.0);
        text.add(CONTAINERS, &labels, containers(record, &records) as f64);
        if record.status == Status::Stopped {
            continue;
        }
        let statistics = ask(&StateDirPaths(&root.join(id)).vmm_socket());
        text.add(ANSWERS, &labels, if statistics.is_ok() { 1.0 } else { 0.0 });
        if let Ok(statistics) = statistics {
            write_machine(&statistics, &labels, text);
        }
    }
    Ok(())
}

fn containers(first: &Record, all: &[Record]) -> usize {
    let is_of = |record: &&Record| record.id == first.id || record.sandbox.as_ref() == Some(&first.id);
    all.iter().filter(is_of).filter(|record| record.status != Status::Stopped).count()
}

fn write_machine(statistics: &Statistics, labels: &[(&str, &str)], text: &mut Text) {
    text.add(RESIDENT, labels, statistics.memory_resident_bytes as f64);
    text.add(REPORTED, labels, statistics.memory_reported_bytes as f64);
    text.add(EXITS, labels, statistics.vcpu_exits as f64);
    for (device, counters) in &statistics.devices {
        for (counter, value) in counters {
            let of = [("device", device.as_str()), ("counter", counter.as_str())];
            text.add(DEVICES, &[labels, &of].concat(), *value as f64);
        }
    }
}

fn ask(path: &Path) -> io::Result<Statistics> {
    match vmm_control::ask(path, ControlRequest::Statistics, None, ANSWER_TIME)? {
        ControlReply::Statistics(statistics) => Ok(statistics),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
