//! From what is wanted to a [`Plan`]: the one way there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{BoxBuilder, Spec};
use sandbox_protocol::{Create, RootWrites, Streams};
use sandbox_vmm_api::{MachineChoice, ShareEntry, VmConfig, VsockConfig};

use super::Error;
use super::pod::Pod;
use crate::artefact::Artefact;
use crate::cgroup::{self, Cgroup};
use crate::config::Config;
use crate::hooks::HostHooks;
use crate::log::Log;
use crate::network;
use crate::sandbox::{ContainerPlan, Home, MachinePlan, Plan, PodPlan, Times};
use crate::spec::{
    Asked, Bundle, GuestSpec, Overrides, Role, blocks_of, check_network, rates_of, take_joined,
};
use crate::state::{SandboxId, StateDirPaths, sweep};
use crate::stdio::window_size;

/// The guest's context id. Each machine has a vsock device of its own, so that all can have the same.
const GUEST_CID: u32 = 3;

/// The guest's kernel makes no network interface that nobody has asked for.
const GUEST_CMDLINE: &str = "dummy.numdummies=0";

/// Where sandboxes live on this host, and how.
#[derive(Clone, Debug)]
pub struct Place {
    /// The state root, absolute.
    pub root: PathBuf,
    /// Who makes cgroups.
    pub cgroups: cgroup::Manager,
    /// Whether the machine's log is shown.
    pub debug: bool,
    /// What the operator wants.
    pub config: Config,
}

/// The machine that is wanted.
#[derive(Clone, Debug)]
pub struct MachineWanted {
    /// Which; none: as the operator wants.
    pub choice: Option<MachineChoice>,
    /// How long the guest may take to boot, and to answer each request; none: as the operator wants.
    pub boot_timeout: Option<Duration>,
    /// The file that keeps what the guest prints on its console, absolute.
    pub console: Option<PathBuf>,
}

/// What is at the other end of the process's terminal, where it has one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Console {
    /// The terminal of whoever makes the sandbox, who stays; without a terminal, nobody.
    Attended,
    /// A program that is sent its master over this socket, absolute.
    Socket(PathBuf),
    /// The standard streams, which carry its keys and its screen.
    Streams,
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
    pub machine: MachineWanted,
    /// How long the process may run.
    pub timeout: Option<Duration>,
    /// Whether it lives on without the command that makes it.
    pub detached: bool,
    /// What is at the other end of its terminal.
    pub console: Console,
}

/// Reads the bundle and decides everything.
pub fn plan(wanted: Wanted<'_>, place: &Place, log: &Log) -> Result<Plan, Error> {
    let bundle = Bundle::load(wanted.bundle, &wanted.overrides)?;
    bundle.warnings().iter().for_each(|warning| log.warn(warning));
    let asked = Asked::of(bundle.spec(), &place.config.annotations)?;
    if let Err(error) = sweep(&place.root) {
        log.debug(&format!("leftovers of dead sandboxes could not be removed: {error}"));
    }
    let mut guest = GuestSpec::of(&bundle, &wanted.id, asked.root_writes.unwrap_or(wanted.writes))?;
    set_console_size(&mut guest);
    check_terminal(&guest.spec, wanted.detached, &wanted.console)?;
    let role = Role::of(bundle.spec())?;
    check_network(bundle.spec(), &role)?;
    let joined = match &role {
        Role::Member(sandbox) => Pod::find(&place.root, sandbox)?.joined(&mut guest.spec)?,
        Role::Alone | Role::Sandbox => take_joined(&mut guest.spec, |_, _| None)?,
    };
    let GuestSpec { spec, shares, volumes, root } = guest;
    let home = match role {
        Role::Member(_) if !wanted.detached => return Err(Error::Usage(NO_FOREGROUND.into())),
        Role::Member(sandbox) => Home::Pod(PodPlan { sandbox, shares }),
        Role::Alone | Role::Sandbox => {
            // An engine of pods dials there.
            let takes_loopback = role == Role::Sandbox;
            Home::Own(Box::new(machine(&wanted, &bundle, asked, shares, takes_loopback, place)?))
        }
    };
    let container = ContainerPlan {
        create: Create {
            container: wanted.id.to_string(),
            spec,
            root,
            user: bundle.user().map(str::to_owned),
            // The monitor, which has them, knows better.
            streams: Streams { stdin: true, stdout: true, stderr: true },
            joined,
            devices: Vec::new(),
            volumes,
        },
        blocks: blocks_of(bundle.spec())?,
        id: wanted.id,
        bundle: bundle.path().into(),
        rootfs: bundle.root().into(),
        root: place.root.clone(),
        annotations: annotations(bundle.spec()),
        network: match &home {
            Home::Own(_) => network::Wanted::of(bundle.spec()),
            // It has that of the pod.
            Home::Pod(_) => network::Wanted::Loopback,
        },
        hooks: HostHooks::of(bundle.spec()),
        detached: wanted.detached,
        stand_in: None,
        console_socket: match wanted.console {
            Console::Socket(path) => Some(path),
            Console::Attended | Console::Streams => None,
        },
        cgroup: host_cgroup(bundle.spec(), place.cgroups)?,
    };
    Ok(Plan { container, home, starts: place.config.metrics.clone() })
}

const NO_FOREGROUND: &str = "the configuration's annotations say that the container joins a pod, which works with \
                             `sandbox create`, or `sandbox run --detach`";

/// The machine for a container of its own.
fn machine(
    wanted: &Wanted<'_>,
    bundle: &Bundle,
    asked: Asked,
    shares: Vec<ShareEntry>,
    takes_loopback: bool,
    place: &Place,
) -> Result<MachinePlan, Error> {
    let config = &place.config.machine;
    let size = config.sizes.machine(bundle.spec())?;
    let find = |artefact: Artefact| artefact.find(config);
    let (kernel, image, vmm) = (find(Artefact::Kernel)?, find(Artefact::Image)?, find(Artefact::Vmm)?);
    let directory = place.root.join(wanted.id.as_str());
    let paths = StateDirPaths(&directory);
    Ok(MachinePlan {
        vmm,
        config: VmConfig {
            machine: wanted.machine.choice.unwrap_or(config.choice),
            kernel,
            image,
            memory_mib: asked.memory_mib.unwrap_or(size.memory_mib),
            vcpus: asked.vcpus.unwrap_or(size.vcpus),
            cmdline: GUEST_CMDLINE.into(),
            vsock: Some(VsockConfig { cid: GUEST_CID, socket: paths.vsock_socket() }),
            shares,
            disks: Vec::new(),
            nets: Vec::new(),
            balloon: true,
            console: wanted.machine.console.clone(),
            control_socket: paths.vmm_socket(),
            rates: rates_of(bundle.spec())?,
            ids: None,
            // Others may join what lives on.
            writable_later: wanted.detached,
        },
        times: Times {
            answer: wanted.machine.boot_timeout.unwrap_or(config.boot_timeout),
            run: wanted.timeout,
        },
        takes_loopback,
        debug: place.debug,
    })
}

fn annotations(spec: &Spec) -> std::collections::BTreeMap<String, String> {
    spec.annotations().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Where the sandbox is put on the host. Without a path in the configuration it stays where it was started.
fn host_cgroup(spec: &Spec, manager: cgroup::Manager) -> Result<Option<Cgroup>, Error> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    match path.filter(|path| !path.as_os_str().is_empty() && manager != cgroup::Manager::Disabled) {
        Some(path) => Ok(Some(Cgroup::of(path, manager)?)),
        None => Ok(None),
    }
}

/// A terminal needs somebody at its other end.
fn check_terminal(spec: &Spec, detached: bool, console: &Console) -> Result<(), Error> {
    let wanted = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    match (wanted, detached, console) {
        (true, true, Console::Attended) => Err(Error::Usage(
            "cannot allocate tty if the sandbox will detach without setting console socket: give \
             --console-socket, or set process.terminal to false"
                .into(),
        )),
        (false, _, Console::Socket(_)) => Err(Error::Usage(
            "cannot use console socket if the sandbox will not allocate tty: set process.terminal to true, or \
             leave --console-socket out"
                .into(),
        )),
        _ => Ok(()),
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
