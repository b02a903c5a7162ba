//! From a command line to a [`Plan`]: what `run` and `create` share.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{BoxBuilder, Spec};
use sandbox_protocol::{Create, RootWrites, Streams};
use sandbox_vmm_api::{MachineChoice, MachineKind, VmConfig, VsockConfig};

use super::{Error, Global};
use crate::artefact::Artefact;
use crate::cgroup;
use crate::hooks::HostHooks;
use crate::log::Log;
use crate::quantity::Span;
use crate::sandbox::{Plan, Times};
use crate::spec::{Bundle, GuestSpec, MachineSize, Overrides};
use crate::state::{SandboxId, StateDirPaths, sweep};
use crate::stdio::window_size;

/// The guest's context id. Each machine has a vsock device of its own, so that all can have the same.
const GUEST_CID: u32 = 3;

/// The options that concern the machine.
#[derive(Clone, Debug, clap::Args)]
pub struct MachineOptions {
    /// The machine to run on: kvm, qemu, or whichever works better here
    #[arg(long, value_enum, default_value = "auto", env = "SANDBOX_MACHINE", hide_env = true)]
    pub machine: Machine,
    /// How long the guest may take to boot, and to answer each request
    #[arg(long, value_name = "DURATION")]
    pub boot_timeout: Option<Span>,
    /// Keep what the guest prints on its console in this file
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
}

/// What `--machine` takes.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Machine {
    /// KVM.
    Kvm,
    /// QEMU's TCG.
    Qemu,
    /// Whichever works better.
    Auto,
}

/// What is wanted of a sandbox.
pub struct Wanted<'a> {
    /// Its name.
    pub id: SandboxId,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Changes to the configuration.
    pub overrides: Overrides,
    /// Where writes to the root file system go.
    pub writes: RootWrites,
    /// The machine.
    pub machine: &'a MachineOptions,
    /// How long the process may run.
    pub timeout: Option<Span>,
    /// Whether it lives on without the command that makes it.
    pub detached: bool,
    /// Where the master of its terminal is sent.
    pub console_socket: Option<PathBuf>,
}

/// Reads the bundle and decides everything.
pub fn plan(wanted: Wanted<'_>, global: &Global, log: &Log) -> Result<Plan, Error> {
    let bundle = Bundle::load(wanted.bundle, &wanted.overrides)?;
    let size = MachineSize::of(bundle.spec())?;
    let Wanted { id, writes, .. } = wanted;
    let mut guest = GuestSpec::of(&bundle, &id, writes)?;
    set_console_size(&mut guest);
    check_terminal(&guest.spec, wanted.detached, wanted.console_socket.is_some())?;
    let (kernel, image, vmm) = (Artefact::Kernel.find()?, Artefact::Image.find()?, Artefact::Vmm.find()?);
    let root = global.root();
    if let Err(error) = sweep(&root) {
        log.debug(&format!("leftovers of dead sandboxes could not be removed: {error}"));
    }
    let directory = root.join(id.as_str());
    let paths = StateDirPaths(&directory);
    let machine = VmConfig {
        machine: wanted.machine.machine.into(),
        kernel,
        image,
        memory_mib: size.memory_mib,
        vcpus: size.vcpus,
        cmdline: String::new(),
        vsock: Some(VsockConfig { cid: GUEST_CID, socket: paths.vsock_socket() }),
        shares: guest.shares,
        disks: Vec::new(),
        nets: Vec::new(),
        balloon: true,
        console: wanted.machine.console.as_deref().map(absolute),
        control_socket: paths.vmm_socket(),
    };
    let create = Create {
        container: id.to_string(),
        spec: guest.spec,
        root: guest.root,
        user: bundle.user().map(str::to_owned),
        streams: Streams { stdin: true, stdout: true, stderr: true },
    };
    Ok(Plan {
        id,
        bundle: bundle.path().into(),
        rootfs: bundle.root().into(),
        root,
        annotations: annotations(bundle.spec()),
        hooks: HostHooks::of(bundle.spec()),
        vmm,
        machine,
        create,
        times: Times {
            answer: wanted.machine.boot_timeout.map_or(Times::DEFAULT_ANSWER, |span| span.0),
            run: wanted.timeout.map(|span| span.0),
        },
        detached: wanted.detached,
        stand_in: None,
        console_socket: wanted.console_socket.as_deref().map(absolute),
        cgroup: host_cgroup(bundle.spec(), global.systemd_cgroup)?,
        debug: global.debug,
    })
}

fn annotations(spec: &Spec) -> std::collections::BTreeMap<String, String> {
    spec.annotations().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Where the sandbox is put on the host. Without a path in the configuration it stays where it was started.
fn host_cgroup(spec: &Spec, systemd: bool) -> Result<Option<PathBuf>, Error> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    Ok(path
        .filter(|path| !path.as_os_str().is_empty())
        .map(|path| cgroup::check(path, systemd))
        .transpose()?)
}

/// A terminal needs somebody at its other end.
fn check_terminal(spec: &Spec, detached: bool, has_socket: bool) -> Result<(), Error> {
    let wanted = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    match (wanted, detached, has_socket) {
        (true, true, false) => Err(Error::Usage(
            "cannot allocate tty if the sandbox will detach without setting console socket: give \
             --console-socket, or set process.terminal to false"
                .into(),
        )),
        (false, _, true) => Err(Error::Usage(
            "cannot use console socket if the sandbox will not allocate tty: set process.terminal to true, or \
             leave --console-socket out"
                .into(),
        )),
        _ => Ok(()),
    }
}

impl Machine {
    /// Whether the choice is left to the runtime.
    pub fn is_auto(self) -> bool {
        matches!(self, Self::Auto)
    }
}

impl From<Machine> for MachineChoice {
    fn from(machine: Machine) -> Self {
        match machine {
            Machine::Kvm => Self::Kvm,
            Machine::Qemu => Self::Qemu,
            Machine::Auto => Self::Auto,
        }
    }
}

/// A terminal begins with the size of ours, if we have one.
fn set_console_size(guest: &mut GuestSpec) {
    let Some(process) = guest.spec.process_mut() else { return };
    if let (Some(true), Some((width, height))) = (process.terminal(), window_size(std::io::stdin())) {
        let size = BoxBuilder::default().width(width).height(height).build();
        process.set_console_size(size.ok());
    }
}

/// The name of a machine, as `--machine` takes it.
pub fn name(machine: MachineKind) -> &'static str {
    match machine {
        MachineKind::Kvm => "kvm",
        MachineKind::Qemu => "qemu",
    }
}

/// A path that means the same to another process.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}
