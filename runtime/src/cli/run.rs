//! `sandbox run`.

use std::path::PathBuf;

use oci_spec::runtime::BoxBuilder;
use sandbox_protocol::{Create, RootWrites, Streams};
use sandbox_vmm_api::{MachineChoice, MachineKind, VmConfig, VsockConfig};

use super::{Error, Global};
use crate::artefact::Artefact;
use crate::log::Log;
use crate::quantity::{Cpus, Size, Span};
use crate::sandbox::{Ending, Plan, Times};
use crate::spec::{Bundle, GuestSpec, MachineSize, Overrides};
use crate::state::{SandboxId, StateDirPaths, sweep};
use crate::stdio::window_size;
use crate::timings::{Moment, Timeline};
use crate::{client, exit};

/// The guest's context id. Each machine has a vsock device of its own, so that all can have the same.
const GUEST_CID: u32 = 3;

const OUT_OF_MEMORY: &str =
    "the container reached its memory limit and a process in it was killed: --memory SIZE gives more";

/// The arguments of `sandbox run`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The bundle: a directory with config.json and a root file system
    #[arg(default_value = ".")]
    pub bundle: PathBuf,
    /// Run this instead of the configuration's command
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    /// Name of the sandbox [default: a random one]
    #[arg(long)]
    id: Option<SandboxId>,
    /// Stop the sandbox when its process has run this long, with exit code 124
    #[arg(long, value_name = "DURATION")]
    timeout: Option<Span>,
    /// Memory limit, such as 512M
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<Size>,
    /// CPU limit, such as 2 or 0.5
    #[arg(long, value_name = "N")]
    cpus: Option<Cpus>,
    /// Set an environment variable; a NAME alone takes its value from here
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Run as this user of the container
    #[arg(long, short, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Run in this directory of the container
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Host name of the container
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Let writes to the root file system go through to the bundle; without it they vanish
    #[arg(long)]
    persist: bool,
    /// The machine to run on: kvm, qemu, or whichever works better here
    #[arg(long, value_enum, default_value = "auto")]
    machine: Machine,
    /// How long the guest may take to boot, and to answer each request
    #[arg(long, value_name = "DURATION")]
    boot_timeout: Option<Span>,
    /// Keep what the guest prints on its console in this file
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Print where the time went
    #[arg(long)]
    timings: bool,
    /// Do not say which machine was chosen
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Machine {
    Kvm,
    Qemu,
    Auto,
}

/// Runs a bundle. Returns the exit code.
pub fn run(args: Args, global: &Global, log: &Log) -> Result<u8, Error> {
    let mut timeline = Timeline::from(Moment::now());
    let plan = prepare(&args, global, log)?;
    timeline.mark("read bundle");
    let mut on_machine = |kind: MachineKind, reason: &str| {
        let choice = format!("machine: {}: {reason}", name(kind));
        match args.machine.is_auto() && !args.quiet {
            true => log.info(&choice),
            false => log.debug(&choice),
        }
    };
    let (ending, rest) = client::run(&plan, &mut on_machine)?;
    timeline.append(rest);
    timeline.mark("end monitor");
    match &ending {
        Ending::Failed { message, .. } => log.error(message),
        Ending::Exited { out_of_memory: true, .. } => log.info(OUT_OF_MEMORY),
        Ending::Exited { .. } => {}
    }
    if args.timings {
        eprint!("{}", timeline.table());
    }
    Ok(exit::code_of(&ending))
}

fn prepare(args: &Args, global: &Global, log: &Log) -> Result<Plan, Error> {
    let bundle = Bundle::load(&args.bundle, &args.overrides())?;
    let size = MachineSize::of(bundle.spec())?;
    let id = args.id.clone().unwrap_or_else(SandboxId::random);
    let writes = if args.persist { RootWrites::Through } else { RootWrites::Overlay };
    let mut guest = GuestSpec::of(&bundle, &id, writes)?;
    set_console_size(&mut guest);
    let (kernel, image, vmm) = (Artefact::Kernel.find()?, Artefact::Image.find()?, Artefact::Vmm.find()?);
    let root = global.root();
    if let Err(error) = sweep(&root) {
        log.debug(&format!("leftovers of dead sandboxes could not be removed: {error}"));
    }
    let directory = root.join(id.as_str());
    let paths = StateDirPaths(&directory);
    let machine = VmConfig {
        machine: args.machine.into(),
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
        console: args.console.as_deref().map(absolute),
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
        root,
        annotations: bundle
            .spec()
            .annotations()
            .iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect(),
        vmm,
        machine,
        create,
        times: Times {
            answer: args.boot_timeout.map_or(Times::DEFAULT_ANSWER, |span| span.0),
            run: args.timeout.map(|span| span.0),
        },
        debug: global.debug,
    })
}

impl Args {
    fn overrides(&self) -> Overrides {
        Overrides {
            args: self.command.clone(),
            env: self.env.clone(),
            cwd: self.workdir.clone(),
            user: self.user.clone(),
            hostname: self.hostname.clone(),
            memory: self.memory,
            cpus: self.cpus,
        }
    }
}

impl Machine {
    fn is_auto(self) -> bool {
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

fn absolute(path: &std::path::Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}
