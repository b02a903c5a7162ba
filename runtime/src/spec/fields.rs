//! The one table of `config.json` fields: what is honoured, what is refused and why.
//!
//! Paths are written with `[]` for the elements of a list and `*` for the keys of a map. A field that is refused
//! is still accepted with an empty value (`null`, `false`, `0`, `""`, `[]`, `{}`), which asks for nothing.
//! `docs/config-fields.md` is made from this table, and a test holds the two together.

/// A field of `config.json`.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its JSON path.
    pub path: &'static str,
    /// What happens to it.
    pub rule: Rule,
}

/// What happens to a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rule {
    /// It does what the OCI specification says; the text is what there is to know besides.
    Honoured(&'static str),
    /// It is read and has no effect, as the specification allows.
    Ignored(&'static str),
    /// It is an error that gives this reason and says what to do.
    Refused(&'static str),
}

use Rule::{Honoured, Ignored, Refused};

const NO_APPARMOR: &str = "profiles are the host kernel's; the guest's has no AppArmor, and the virtual machine is the \
                           boundary";
const NO_SELINUX: &str =
    "labels are the host kernel's; the guest's has no SELinux, and the virtual machine is the boundary";
const BIND_IDS: &str = "of a bind mount, which then needs a file system of the host that has ID-mapped mounts; both kinds or none";
const SECCOMP_ACTION: &str = "all but SCMP_ACT_NOTIFY, which asks a process of the host";
const GUEST_ID: &str = "an id of the virtual machine, and on shared files one of the host";
const HOOK_ENV: &str = "left out: the environment of `sandbox`";
const NO_OTHER_OS: &str = "the sandbox runs Linux containers; this is for another operating system";
const V1_ONLY: &str = "it exists in version 1 of cgroups only, and the guest has version 2";
const GUEST_DEVICE: &str = "a device of the guest, not of the host";
const HOST_BLOCK: &str = "a device of the guest; of the host where it is a block device and a rule in \
                          `linux.resources.devices` allows just that one";
const GUEST_CPUS: &str = "numbers of the virtual machine's CPUs; for `exec`";
const REAL_TIME: &str = "the guest kernel has no real-time group scheduling";

/// Every field of the OCI runtime specification 1.2.
pub const FIELDS: &[Field] = &[
    field("ociVersion", Honoured("1.x")),
    field(
        "annotations.*",
        Ignored(
            "for the engine; passed on in `state.json`; those of pods and `dev.sandbox.rate.*` are in the guide",
        ),
    ),
    field("hostname", Honoured("")),
    field("domainname", Honoured("")),
    field("root.path", Honoured("relative to the bundle, or absolute")),
    field("root.readonly", Honoured("")),
    field("process.terminal", Honoured("")),
    field("process.consoleSize.height", Honoured("")),
    field("process.consoleSize.width", Honoured("")),
    field("process.cwd", Honoured("")),
    field("process.env", Honoured("")),
    field("process.args", Honoured("")),
    field("process.commandLine", Refused(NO_OTHER_OS)),
    field("process.rlimits[].type", Honoured("")),
    field("process.rlimits[].soft", Honoured("")),
    field("process.rlimits[].hard", Honoured("")),
    field(
        "process.capabilities.bounding",
        Honoured("as of all sets, names that are no capabilities are left out with a warning"),
    ),
    field("process.capabilities.effective", Honoured("")),
    field("process.capabilities.inheritable", Honoured("")),
    field("process.capabilities.permitted", Honoured("")),
    field(
        "process.capabilities.ambient",
        Honoured("as the kernel grants it: those that are permitted and inheritable as well"),
    ),
    field("process.noNewPrivileges", Honoured("")),
    field("process.oomScoreAdj", Honoured("")),
    field("process.user.uid", Honoured("")),
    field("process.user.gid", Honoured("")),
    field("process.user.umask", Honoured("")),
    field("process.user.additionalGids", Honoured("")),
    field("process.user.username", Refused(NO_OTHER_OS)),
    field("process.apparmorProfile", Ignored(NO_APPARMOR)),
    field("process.selinuxLabel", Ignored(NO_SELINUX)),
    field("process.scheduler.policy", Honoured("all but SCHED_ISO, which Linux does not have")),
    field("process.scheduler.nice", Honoured("")),
    field("process.scheduler.priority", Honoured("")),
    field("process.scheduler.flags", Honoured("")),
    field("process.scheduler.runtime", Honoured("")),
    field("process.scheduler.deadline", Honoured("")),
    field("process.scheduler.period", Honoured("")),
    field("process.ioPriority.class", Honoured("")),
    field("process.ioPriority.priority", Honoured("")),
    field("process.execCPUAffinity.initial", Honoured(GUEST_CPUS)),
    field("process.execCPUAffinity.final", Honoured(GUEST_CPUS)),
    field("mounts[].destination", Honoured("")),
    field("mounts[].type", Honoured("bind, proc, sysfs, tmpfs, devpts, mqueue, cgroup")),
    field(
        "mounts[].source",
        Honoured(
            "of a bind mount: a directory or regular file, relative to the bundle or absolute; the host's cgroups \
             stand for the container's own, and the guest's memory for a pod's `/dev/shm` and emptyDir in memory",
        ),
    ),
    field(
        "mounts[].options",
        Honoured(
            "a bind mount without `ro` is written through to the host; `idmap` and `ridmap` without mappings take those \
             of the user namespace",
        ),
    ),
    field("mounts[].uidMappings[].containerID", Honoured(BIND_IDS)),
    field("mounts[].uidMappings[].hostID", Honoured("")),
    field("mounts[].uidMappings[].size", Honoured("")),
    field("mounts[].gidMappings[].containerID", Honoured("")),
    field("mounts[].gidMappings[].hostID", Honoured("")),
    field("mounts[].gidMappings[].size", Honoured("")),
    field(
        "hooks.prestart[].path",
        Honoured(
            "runs on the host before the container is made; the process id in its state is the sandbox's",
        ),
    ),
    field("hooks.prestart[].args", Honoured("")),
    field("hooks.prestart[].env", Honoured(HOOK_ENV)),
    field("hooks.prestart[].timeout", Honoured("")),
    field("hooks.createRuntime[].path", Honoured("runs on the host before the container is made")),
    field("hooks.createRuntime[].args", Honoured("")),
    field("hooks.createRuntime[].env", Honoured(HOOK_ENV)),
    field("hooks.createRuntime[].timeout", Honoured("")),
    field(
        "hooks.createContainer[].path",
        Honoured(
            "runs on the host when the container is made; finds its root file system and volumes in their places",
        ),
    ),
    field("hooks.createContainer[].args", Honoured("")),
    field("hooks.createContainer[].env", Honoured(HOOK_ENV)),
    field("hooks.createContainer[].timeout", Honoured("")),
    field(
        "hooks.startContainer[].path",
        Honoured("a program of the container, run in it with the rights of its process"),
    ),
    field("hooks.startContainer[].args", Honoured("")),
    field("hooks.startContainer[].env", Honoured("")),
    field("hooks.startContainer[].timeout", Honoured("")),
    field(
        "hooks.poststart[].path",
        Honoured("runs on the host when the process runs; a failure is said and no more"),
    ),
    field("hooks.poststart[].args", Honoured("")),
    field("hooks.poststart[].env", Honoured(HOOK_ENV)),
    field("hooks.poststart[].timeout", Honoured("")),
    field(
        "hooks.poststop[].path",
        Honoured("runs on the host when the sandbox has been removed; a failure is said and no more"),
    ),
    field("hooks.poststop[].args", Honoured("")),
    field("hooks.poststop[].env", Honoured(HOOK_ENV)),
    field("hooks.poststop[].timeout", Honoured("")),
    field("linux.namespaces[].type", Honoured("a type that is left out means the virtual machine's own")),
    field(
        "linux.namespaces[].path",
        Honoured(
            "of the type `network`: the interfaces of that namespace of the host lead into the virtual machine. Of a \
             container of a pod: network, ipc, uts and pid of the pod's, by the process that stands for a container of \
             it. Any other is an error",
        ),
    ),
    field("linux.uidMappings[].containerID", Honoured("the id 0 must be mapped")),
    field("linux.uidMappings[].hostID", Honoured(GUEST_ID)),
    field("linux.uidMappings[].size", Honoured("")),
    field("linux.gidMappings[].containerID", Honoured("the id 0 must be mapped")),
    field("linux.gidMappings[].hostID", Honoured(GUEST_ID)),
    field("linux.gidMappings[].size", Honoured("")),
    field("linux.timeOffsets.monotonic.secs", Honoured("")),
    field("linux.timeOffsets.monotonic.nanosecs", Honoured("")),
    field(
        "linux.timeOffsets.boottime.secs",
        Honoured("the guest boots with the sandbox: no offset may reach back behind that"),
    ),
    field("linux.timeOffsets.boottime.nanosecs", Honoured("")),
    field("linux.devices[].type", Honoured("")),
    field("linux.devices[].path", Honoured("")),
    field("linux.devices[].major", Honoured(HOST_BLOCK)),
    field("linux.devices[].minor", Honoured("")),
    field("linux.devices[].fileMode", Honoured("")),
    field("linux.devices[].uid", Honoured("")),
    field("linux.devices[].gid", Honoured("")),
    field("linux.netDevices", Refused("a network device of the host cannot be moved into a virtual machine")),
    field(
        "linux.cgroupsPath",
        Honoured("the cgroup of the host for the virtual machine; the container's limits hold in the guest"),
    ),
    field("linux.resources.devices[].allow", Honoured("")),
    field("linux.resources.devices[].type", Honoured("")),
    field("linux.resources.devices[].major", Honoured("")),
    field("linux.resources.devices[].minor", Honoured("")),
    field("linux.resources.devices[].access", Honoured("")),
    field("linux.resources.memory.limit", Honoured("also sizes the virtual machine")),
    field("linux.resources.memory.reservation", Honoured("")),
    field("linux.resources.memory.swap", Honoured("the guest has no swap, so that it never gets any")),
    field("linux.resources.memory.kernel", Refused(V1_ONLY)),
    field("linux.resources.memory.kernelTCP", Refused(V1_ONLY)),
    field("linux.resources.memory.swappiness", Ignored("the guest has no swap")),
    field("linux.resources.memory.disableOOMKiller", Refused(V1_ONLY)),
    field("linux.resources.memory.useHierarchy", Ignored("always so in version 2 of cgroups")),
    field(
        "linux.resources.memory.checkBeforeUpdate",
        Honoured("by `sandbox update`: a limit below what is in use is refused"),
    ),
    field("linux.resources.cpu.shares", Honoured("")),
    field("linux.resources.cpu.quota", Honoured("also sizes the virtual machine")),
    field("linux.resources.cpu.period", Honoured("also sizes the virtual machine")),
    field("linux.resources.cpu.burst", Honoured("")),
    field("linux.resources.cpu.idle", Honoured("")),
    field(
        "linux.resources.cpu.cpus",
        Honoured("numbers of the virtual machine's CPUs, which are made as many"),
    ),
    field("linux.resources.cpu.mems", Honoured("the virtual machine has memory node 0 only")),
    field("linux.resources.cpu.realtimeRuntime", Refused(REAL_TIME)),
    field("linux.resources.cpu.realtimePeriod", Refused(REAL_TIME)),
    field("linux.resources.pids.limit", Honoured("")),
    field("linux.resources.blockIO.weight", Honoured("")),
    field("linux.resources.blockIO.leafWeight", Refused(V1_ONLY)),
    field("linux.resources.blockIO.weightDevice[].major", Honoured(GUEST_DEVICE)),
    field("linux.resources.blockIO.weightDevice[].minor", Honoured("")),
    field(
        "linux.resources.blockIO.weightDevice[].weight",
        Honoured("where the guest has weights for the device: it has a cost model, or the BFQ scheduler"),
    ),
    field("linux.resources.blockIO.weightDevice[].leafWeight", Refused(V1_ONLY)),
    field("linux.resources.blockIO.throttleReadBpsDevice[].major", Honoured(GUEST_DEVICE)),
    field("linux.resources.blockIO.throttleReadBpsDevice[].minor", Honoured("")),
    field("linux.resources.blockIO.throttleReadBpsDevice[].rate", Honoured("")),
    field("linux.resources.blockIO.throttleWriteBpsDevice[].major", Honoured(GUEST_DEVICE)),
    field("linux.resources.blockIO.throttleWriteBpsDevice[].minor", Honoured("")),
    field("linux.resources.blockIO.throttleWriteBpsDevice[].rate", Honoured("")),
    field("linux.resources.blockIO.throttleReadIOPSDevice[].major", Honoured(GUEST_DEVICE)),
    field("linux.resources.blockIO.throttleReadIOPSDevice[].minor", Honoured("")),
    field("linux.resources.blockIO.throttleReadIOPSDevice[].rate", Honoured("")),
    field("linux.resources.blockIO.throttleWriteIOPSDevice[].major", Honoured(GUEST_DEVICE)),
    field("linux.resources.blockIO.throttleWriteIOPSDevice[].minor", Honoured("")),
    field("linux.resources.blockIO.throttleWriteIOPSDevice[].rate", Honoured("")),
    field("linux.resources.hugepageLimits[].pageSize", Honoured("")),
    field("linux.resources.hugepageLimits[].limit", Honoured("of pages in use, and of pages promised")),
    field("linux.resources.network", Refused(V1_ONLY)),
    field("linux.resources.rdma", Refused("the virtual machine has no RDMA device")),
    field(
        "linux.resources.unified.*",
        Honoured("files of the guest's controllers, `cgroup.max.depth` and `cgroup.max.descendants`"),
    ),
    field("linux.sysctl.*", Honoured("but for `kernel.hostname`, which is `hostname`")),
    field("linux.maskedPaths", Honoured("")),
    field("linux.readonlyPaths", Honoured("")),
    field("linux.rootfsPropagation", Honoured("inside the virtual machine; nothing reaches the host")),
    field("linux.mountLabel", Ignored(NO_SELINUX)),
    field("linux.seccomp.defaultAction", Honoured(SECCOMP_ACTION)),
    field("linux.seccomp.defaultErrnoRet", Honoured("")),
    field("linux.seccomp.architectures", Honoured("")),
    field("linux.seccomp.flags", Honoured("")),
    field("linux.seccomp.syscalls[].names", Honoured("")),
    field("linux.seccomp.syscalls[].action", Honoured(SECCOMP_ACTION)),
    field("linux.seccomp.syscalls[].errnoRet", Honoured("")),
    field("linux.seccomp.syscalls[].args[].index", Honoured("")),
    field("linux.seccomp.syscalls[].args[].value", Honoured("")),
    field("linux.seccomp.syscalls[].args[].valueTwo", Honoured("")),
    field("linux.seccomp.syscalls[].args[].op", Honoured("")),
    field(
        "linux.seccomp.listenerPath",
        Refused("a system call cannot be handed from a virtual machine to a host program"),
    ),
    field("linux.seccomp.listenerMetadata", Refused("it belongs to `listenerPath`, which is not supported")),
    field("linux.intelRdt", Refused("the virtual machine has no cache allocation of its own")),
    field("linux.memoryPolicy", Refused("the virtual machine has one memory node")),
    field("linux.personality.domain", Honoured("")),
    field("linux.personality.flags", Refused("the specification defines none")),
    field("solaris", Refused(NO_OTHER_OS)),
    field("windows", Refused(NO_OTHER_OS)),
    field("freebsd", Refused(NO_OTHER_OS)),
    field("zos", Refused(NO_OTHER_OS)),
    field("vm", Refused("the virtual machine is the installation's: see SANDBOX_KERNEL and SANDBOX_IMAGE")),
];

const fn field(path: &'static str, rule: Rule) -> Field {
    Field { path, rule }
}

/// The table as a page of documentation.
pub fn markdown() -> String {
    let mut page = String::from(INTRODUCTION);
    for (title, wanted) in [("Honoured", 0), ("Accepted without effect", 1), ("Refused", 2)] {
        page += &format!("\n## {title}\n\n| field | |\n|---|---|\n");
        for field in FIELDS {
            let (kind, text) = match field.rule {
                Honoured(text) => (0, text),
                Ignored(text) => (1, text),
                Refused(text) => (2, text),
            };
            if kind == wanted {
                page += &format!("| `{}` | {text} |\n", field.path);
            }
        }
    }
    page
}

const INTRODUCTION: &str = "\
# Fields of `config.json`

What `sandbox` does with each field of the OCI runtime specification. Lists are written `[]`, the keys of maps
`*`. A refused field is an error that names its path, unless its value is empty (`null`, `false`, `0`, `\"\"`,
`[]`, `{}`): that asks for nothing. A field that is not on this page is an error as well.

This page is made from the table in `runtime/src/spec/fields.rs`: change that, then run
`UPDATE_DOCS=1 cargo test -p sandbox-runtime config_fields`.
";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn config_fields_page_is_the_table() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/config-fields.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&page, markdown()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(page).unwrap(), markdown());
    }

    #[test]
    fn no_path_is_there_twice_or_below_a_refused_one() {
        let paths: BTreeSet<_> = FIELDS.iter().map(|f| f.path).collect();
        assert_eq!(paths.len(), FIELDS.len());
        for refused in FIELDS.iter().filter(|f| matches!(f.rule, Refused(_))) {
            let below = format!("{}.", refused.path);
            assert!(!FIELDS.iter().any(|f| f.path.starts_with(&below)), "{}", refused.path);
        }
    }
}
