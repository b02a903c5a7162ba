//! The options that concern the machine.

use std::path::{Path, PathBuf};

use sandbox_vmm_api::MachineChoice;

use crate::lifecycle::MachineWanted;
use crate::quantity::Span;

// The options.
#[derive(Clone, Debug, clap::Args)]
pub struct MachineOptions {
    /// The machine to run on: kvm, qemu, or whichever works better here [default: auto]
    #[arg(long, value_enum, env = "SANDBOX_MACHINE", hide_env = true)]
    pub machine: Option<Machine>,
    /// How long the guest may take to boot, and to answer each request [default: 1m]
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

impl MachineOptions {
    /// What they ask for.
    pub fn wanted(&self) -> MachineWanted {
        MachineWanted {
            choice: self.machine.map(Into::into),
            boot_timeout: self.boot_timeout.map(|span| span.0),
            console: self.console.as_deref().map(absolute),
        }
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

/// A path that means the same to another process.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}
