//! The rules of a configuration that its types do not express.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Linux, LinuxBlockIo, LinuxIOPriority, LinuxNamespace, LinuxNamespaceType, LinuxResources,
    LinuxSchedulerPolicy as Policy, LinuxSeccomp, LinuxSeccompAction as SeccompAction, LinuxSyscall,
    LinuxTimeOffset, Mount, Process, Scheduler, Spec,
};

use super::{Role, SpecError, id_maps};
use crate::hooks::points;

/// The types of mount that the agent makes. A bind mount may have any type: its options say what it is.
const MOUNT_TYPES: [&str; 9] =
    ["bind", "none", "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// The clocks that a time namespace has of its own.
const CLOCKS: [&str; 2] = ["monotonic", "boottime"];

const NANOS_PER_SECOND: u32 = 1_000_000_000;

/// Checks a configuration. Returns the directory of the root file system.
pub fn check(spec: &Spec, bundle: &Path) -> Result<PathBuf, SpecError> {
    let process =
        spec.process().as_ref().ok_or_else(|| value("process", "it is missing: there is nothing to run"))?;
    check_process(process)?;
    check_namespaces(spec)?;
    check_hooks(spec)?;
    spec.linux().as_ref().map_or(Ok(()), check_sysctl)?;
    if let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        check_resources(resources)?;
    }
    if let Some(seccomp) = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) {
        check_seccomp(seccomp)?;
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount, spec.linux().as_ref())?;
    }
    root(spec, bundle)
}

/// Whether a mount is a bind mount.
pub fn is_bind(mount: &Mount) -> bool {
    let by_option = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
    by_option || mount.typ().as_deref() == Some("bind")
}

/// Checks a process.
pub fn check_process(process: &Process) -> Result<(), SpecError> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(value("process.args", "it is empty: there is nothing to run"));
    }
    if !process.cwd().is_absolute() {
        return Err(value("process.cwd", &format!("`{}` is not an absolute path", process.cwd().display())));
    }
    for (index, text) in args.iter().enumerate() {
        no_zero(&format!("process.args[{index}]"), text)?;
    }
    for (index, variable) in process.env().iter().flatten().enumerate() {
        let path = format!("process.env[{index}]");
        no_zero(&path, variable)?;
        if !variable.contains('=') {
            return Err(value(&path, &format!("`{variable}` is not NAME=VALUE")));
        }
    }
    process.scheduler().as_ref().map_or(Ok(()), check_scheduler)?;
    process.io_priority().as_ref().map_or(Ok(()), check_io_priority)
}

/// Each policy has parameters of its own. One that does not belong to it would have no effect.
fn check_scheduler(scheduler: &Scheduler) -> Result<(), SpecError> {
    let policy = *scheduler.policy();
    let error = |field: &str, why: String| Err(value(&format!("process.scheduler.{field}"), &why));
    let real_time = matches!(policy, Policy::SchedFifo | Policy::SchedRr);
    let nice = scheduler.nice().unwrap_or(0);
    let priority = scheduler.priority().unwrap_or(0);
    let times = [
        ("runtime", scheduler.runtime()),
        ("deadline", scheduler.deadline()),
        ("period", scheduler.period()),
    ];
    let time = times.into_iter().find(|(_, time)| time.is_some_and(|time| time != 0));
    match time {
        _ if policy == Policy::SchedIso => error("policy", "Linux has no SCHED_ISO".into()),
        _ if !(-20..=19).contains(&nice) => error("nice", format!("{nice} is not from -20 to 19")),
        _ if real_time && !(1..=99).contains(&priority) => {
            error("priority", format!("{priority} is not from 1 to 99, as {policy} needs it"))
        }
        _ if !real_time && priority != 0 => {
            error("priority", format!("{policy} has none: only SCHED_FIFO and SCHED_RR do"))
        }
        Some((field, _)) if policy != Policy::SchedDeadline => {
            error(field, format!("{policy} has none: only SCHED_DEADLINE does"))
        }
        _ => Ok(()),
    }
}

fn check_io_priority(wanted: &LinuxIOPriority) -> Result<(), SpecError> {
    match wanted.priority() {
        0..=7 => Ok(()),
        other => Err(value("process.ioPriority.priority", &format!("{other} is not from 0 to 7"))),
    }
}

/// A name of the host may be given in one place only: the kernel would take the last.
fn check_sysctl(linux: &Linux) -> Result<(), SpecError> {
    match linux.sysctl().iter().flatten().any(|(name, _)| name.replace('/', ".") == "kernel.hostname") {
        true => Err(value("linux.sysctl.kernel.hostname", "give it as `hostname` instead")),
        false => Ok(()),
    }
}

fn check_hooks(spec: &Spec) -> Result<(), SpecError> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    for (point, list) in points(hooks) {
        for (index, hook) in list.iter().flatten().enumerate() {
            let path = format!("hooks.{point}[{index}]");
            if !hook.path().is_absolute() {
                let why = format!("`{}` is not an absolute path", hook.path().display());
                return Err(value(&format!("{path}.path"), &why));
            }
            if let Some(timeout) = hook.timeout().filter(|seconds| *seconds <= 0) {
                let why = format!("{timeout} is not a number of seconds above zero");
                return Err(value(&format!("{path}.timeout"), &why));
            }
        }
    }
    Ok(())
}

fn check_namespaces(spec: &Spec) -> Result<(), SpecError> {
    let mut seen = HashSet::new();
    let joins = matches!(Role::of(spec)?, Role::Member(_));
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
    for (index, namespace) in namespaces.unwrap_or_default().iter().enumerate() {
        if !joins {
            check_namespace_path(index, namespace)?;
        }
        let path = format!("linux.namespaces[{index}].type");
        if joins && namespace.typ() == LinuxNamespaceType::User {
            let reason =
                "a container of a pod shares namespaces that it could not enter from one of its own".into();
            return Err(SpecError::Unsupported { path, reason });
        }
        if !seen.insert(namespace.typ()) {
            return Err(value(&path, &format!("`{}` is there twice", namespace.typ())));
        }
    }
    id_maps::check(spec, seen.contains(&LinuxNamespaceType::User))?;
    let offsets = spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref());
    check_time_offsets(offsets.into_iter().flatten(), seen.contains(&LinuxNamespaceType::Time))
}

/// Only the network can be that of a namespace of the host.
fn check_namespace_path(index: usize, namespace: &LinuxNamespace) -> Result<(), SpecError> {
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(());
    };
    let field = format!("linux.namespaces[{index}].path");
    if namespace.typ() != LinuxNamespaceType::Network {
        let reason = format!(
            "the {} namespace of the host cannot be joined from a virtual machine (but for a container of a \
             pod, whose annotations say so)",
            namespace.typ()
        );
        return Err(SpecError::Unsupported { path: field, reason });
    }
    if !path.is_absolute() {
        return Err(value(&field, &format!("`{}` is not an absolute path", path.display())));
    }
    Ok(())
}

fn check_time_offsets<'a>(
    offsets: impl Iterator<Item = (&'a String, &'a LinuxTimeOffset)>,
    own_time: bool,
) -> Result<(), SpecError> {
    for (clock, offset) in offsets {
        let path = format!("linux.timeOffsets.{clock}");
        if !own_time {
            return Err(value(
                &path,
                "it needs a time namespace: add {\"type\": \"time\"} to linux.namespaces",
            ));
        }
        if !CLOCKS.contains(&clock.as_str()) {
            return Err(value(&path, "the clocks of a time namespace are monotonic and boottime"));
        }
        if offset.nanosecs().is_some_and(|nanos| nanos >= NANOS_PER_SECOND) {
            return Err(value(&format!("{path}.nanosecs"), "it is a second or more"));
        }
    }
    Ok(())
}

fn check_resources(resources: &LinuxResources) -> Result<(), SpecError> {
    for (index, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        let size = limit.page_size();
        if !is_page_size(size) {
            let why = format!("`{size}` is not a number and KB, MB or GB");
            return Err(value(&format!("linux.resources.hugepageLimits[{index}].pageSize"), &why));
        }
        if limit.limit() < 0 {
            let path = format!("linux.resources.hugepageLimits[{index}].limit");
            return Err(value(&path, "it is negative"));
        }
    }
    // Whether there is such a controller, the guest knows.
    for file in resources.unified().iter().flat_map(|unified| unified.keys()) {
        let plain = file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain || !file.contains('.') {
            let why = "it is not the name of a cgroup file, such as memory.high";
            return Err(value(&format!("linux.resources.unified.{file}"), why));
        }
    }
    resources.block_io().as_ref().map_or(Ok(()), check_block)
}

fn is_page_size(text: &str) -> bool {
    let number = ["KB", "MB", "GB"].iter().find_map(|unit| text.strip_suffix(unit));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn check_block(block: &LinuxBlockIo) -> Result<(), SpecError> {
    let devices = block.weight_device().iter().flatten().enumerate();
    let of_devices =
        devices.map(|(index, device)| (format!("weightDevice[{index}].weight"), device.weight()));
    for (name, weight) in std::iter::once(("weight".into(), block.weight())).chain(of_devices) {
        // As ever, 0 is none.
        if weight.is_some_and(|weight| weight != 0 && !(10..=1000).contains(&weight)) {
            let why = format!("{} is not from 10 to 1000", weight.unwrap_or_default());
            return Err(value(&format!("linux.resources.blockIO.{name}"), &why));
        }
    }
    Ok(())
}

/// A system call that another process decides about needs that process beside the guest's kernel.
fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), SpecError> {
    let rules = seccomp.syscalls().iter().flatten().map(LinuxSyscall::action).enumerate();
    let rules = rules.map(|(index, action)| (format!("linux.seccomp.syscalls[{index}].action"), action));
    let default = ("linux.seccomp.defaultAction".to_owned(), seccomp.default_action());
    match std::iter::once(default).chain(rules).find(|(_, action)| *action == SeccompAction::ScmpActNotify) {
        None => Ok(()),
        Some((path, _)) => Err(SpecError::Unsupported {
            path,
            reason: "SCMP_ACT_NOTIFY asks a process of the host, which the guest's kernel cannot reach"
                .into(),
        }),
    }
}

fn check_mount(index: usize, mount: &Mount, linux: Option<&Linux>) -> Result<(), SpecError> {
    let destination = mount.destination();
    if !destination.is_absolute() {
        let why = format!("`{}` is not an absolute path", destination.display());
        return Err(value(&format!("mounts[{index}].destination"), &why));
    }
    no_zero(&format!("mounts[{index}].destination"), &destination.to_string_lossy())?;
    id_maps::check_mount(index, mount, linux)?;
    let path = format!("mounts[{index}].type");
    match mount.typ().as_deref() {
        _ if is_bind(mount) => Ok(()),
        None => Err(value(&path, "it is missing, and no option says `bind`")),
        Some(kind) if MOUNT_TYPES.contains(&kind) => Ok(()),
        Some(kind) => {
            let reason = format!("file systems of type `{kind}` cannot be mounted in the guest");
            Err(SpecError::Unsupported { path, reason })
        }
    }
}

fn root(spec: &Spec, bundle: &Path) -> Result<PathBuf, SpecError> {
    let root =
        spec.root().as_ref().ok_or_else(|| value("root", "it is missing: there is no root file system"))?;
    let path = bundle.join(root.path());
    let real = path
        .canonicalize()
        .map_err(|error| SpecError::Root { path: path.clone(), why: format!("cannot be used: {error}") })?;
    match fs::metadata(&real) {
        Ok(metadata) if metadata.is_dir() => Ok(real),
        Ok(_) => Err(SpecError::Root { path, why: "is not a directory".into() }),
        Err(error) => Err(SpecError::Root { path, why: format!("cannot be used: {error}") }),
    }
}

fn no_zero(path: &str, text: &str) -> Result<(), SpecError> {
    match text.contains('\0') {
        true => Err(value(path, "it contains a zero character, which no system call takes")),
        false => Ok(()),
    }
}

fn value(path: &str, why: &str) -> SpecError {
    SpecError::Value { path: path.into(), why: why.into() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The error of a good configuration after `change`.
    fn error(change: impl FnOnce(&mut Value)) -> String {
        let bundle = tempfile::tempdir().unwrap();
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        fs::write(bundle.path().join("file"), "").unwrap();
        let mut config = json!({"ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}}});
        check(&serde_json::from_value(config.clone()).unwrap(), bundle.path()).unwrap();
        change(&mut config);
        check(&serde_json::from_value(config).unwrap(), bundle.path()).unwrap_err().to_string()
    }

    #[test]
    fn each_rule_has_its_error() {
        let namespaces = |types: &[&str]| json!({"namespaces": types.iter().map(|t| json!({"type": t})).collect::<Vec<_>>()});
        let clock = |clock: &str, nanos: u32| json!({"namespaces": [{"type": "time"}], "timeOffsets": {clock: {"nanosecs": nanos}}});
        let unified = |file: &str| json!({"resources": {"unified": {file: "1"}}});
        let pages = |size: &str, limit: i64| json!({"resources": {"hugepageLimits": [{"pageSize": size, "limit": limit}]}});
        let block = |block: Value| json!({"resources": {"blockIO": block}});
        for (pointer, new, wanted) in [
            ("/process", json!(null), "`process`: it is missing"),
            ("/process/args", json!([]), "`process.args`: it is empty"),
            ("/linux", json!({"sysctl": {"kernel/hostname": "a"}}), "give it as `hostname`"),
            ("/process/args", json!([""]), "`process.args`: it is empty"),
            ("/process/args", json!(["a", "b\0"]), "`process.args[1]`: it contains a zero"),
            ("/process/env", json!(["A=1", "B"]), "`process.env[1]`: `B` is not NAME=VALUE"),
            ("/process/cwd", json!("tmp"), "`process.cwd`: `tmp` is not an absolute"),
            ("/process/scheduler", json!({"policy": "SCHED_ISO"}), "`process.scheduler.policy`"),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_OTHER", "nice": 20}),
                "`process.scheduler.nice`: 20",
            ),
            ("/process/scheduler", json!({"policy": "SCHED_RR"}), "`process.scheduler.priority`: 0 is not"),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_BATCH", "priority": 1}),
                "`process.scheduler.priority`: SCHED_BATCH has none",
            ),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_FIFO", "priority": 1, "period": 1}),
                "`process.scheduler.period`: SCHED_FIFO has none",
            ),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
                "`process.ioPriority.priority`: 8 is not",
            ),
            ("/root", json!(null), "`root`: it is missing"),
            ("/root/path", json!("nowhere"), "`root.path`"),
            ("/root/path", json!("file"), "is not a directory"),
            ("/mounts", json!([{"destination": "a", "type": "tmpfs"}]), "`mounts[0].destination`: `a`"),
            ("/mounts", json!([{"destination": "/a"}]), "`mounts[0].type`: it is missing"),
            ("/mounts", json!([{"destination": "/a", "type": "nfs"}]), "`mounts[0].type`: not supported"),
            ("/linux", namespaces(&["pid", "pid"]), "`linux.namespaces[1].type`: `pid` is there twice"),
            ("/linux", unified("a/b"), "`linux.resources.unified.a/b`: it is not"),
            ("/linux", unified("tasks"), "`linux.resources.unified.tasks`: it is not"),
            ("/linux", pages("2M", 1), "`linux.resources.hugepageLimits[0].pageSize`: `2M`"),
            ("/linux", pages("2MB", -1), "`linux.resources.hugepageLimits[0].limit`: it is negative"),
            ("/linux", block(json!({"weight": 9})), "`linux.resources.blockIO.weight`: 9 is not"),
            (
                "/linux",
                block(json!({"weightDevice": [{"major": 1, "minor": 1, "weight": 1001}]})),
                "`linux.resources.blockIO.weightDevice[0].weight`: 1001 is not",
            ),
            (
                "/linux",
                json!({"timeOffsets": {"boottime": {"secs": 1}}}),
                "`linux.timeOffsets.boottime`: it needs a time namespace",
            ),
            ("/linux", clock("realtime", 0), "`linux.timeOffsets.realtime`: the clocks"),
            ("/linux", clock("monotonic", 1_000_000_000), "`linux.timeOffsets.monotonic.nanosecs`: it is"),
            ("/linux", namespaces(&["user"]), "`linux.uidMappings`: it is missing"),
        ] {
            let message = error(|config| match pointer.rsplit_once('/') {
                Some((parent, key)) => config.pointer_mut(parent).unwrap()[key] = new.clone(),
                None => unreachable!("every pointer has a slash"),
            });
            assert!(message.contains(wanted), "{pointer}: {message}");
        }
    }
}
