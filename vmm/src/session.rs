//! One machine, from its configuration to its end.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sandbox_vmm_api::{ExitReason, MachineChoice, MachineKind, VmEvent};

use crate::boot::{self, BootError};
use crate::config::{Config, ConfigError};
use crate::confine::{self, Kind};
use crate::control::{Control, ListenError, Verdict};
use crate::events::{EventSocket, Peer};
use crate::kvm::load::Loaded;
use crate::kvm::open::KvmUnusable;
use crate::kvm::{self, KvmMachine};
use crate::machine::{Machine, MachineError};
use crate::memory::MapError;
use crate::probe;
use crate::qemu::{self, QemuMachine};
use crate::timeline::Timeline;

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The configuration is no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The guest's files are no good.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// There is no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// The control socket cannot be made.
    #[error(transparent)]
    Control(#[from] ListenError),
    /// KVM was asked for and cannot be used.
    #[error("the machine `kvm` was asked for and cannot be used: {}; {}", .0.finding, .0.remedy)]
    KvmUnusable(#[source] KvmUnusable),
    /// Neither machine can be used.
    #[error(
        "this host runs neither machine: {}; {}. The software machine needs {}: apt install qemu-system-x86",
        .kvm.finding, .kvm.remedy, qemu::PROGRAM
    )]
    NoMachine {
        /// Why KVM cannot.
        kvm: KvmUnusable,
    },
    /// The machine on KVM did not start.
    #[error(transparent)]
    Kvm(#[from] kvm::StartError),
    /// The machine on QEMU did not start.
    #[error(transparent)]
    Qemu(#[from] qemu::Error),
    /// The vCPUs could not be let run.
    #[error(transparent)]
    Resume(#[from] MachineError),
    /// The process cannot wait for events.
    #[error("cannot wait for the machine: {0}")]
    Wait(#[source] io::Error),
}

/// Runs the machine that standard input describes to its end. The process must have no other thread yet.
pub fn run(events: &EventSocket) -> ExitReason {
    match start(events) {
        Ok((mut machine, mut control)) => match watch(machine.as_mut(), &mut control, events) {
            Ok(reason) => reason,
            Err(error) => {
                machine.stop();
                ExitReason::Failed { message: error.to_string() }
            }
        },
        Err(error) => ExitReason::Failed { message: error.to_string() },
    }
}

fn start(events: &EventSocket) -> Result<(Box<dyn Machine>, Control), SessionError> {
    let mut timeline = Timeline::default();
    let config = Config::read(io::stdin().lock())?;
    let control = Control::listen(config.control_socket())?;
    timeline.step("read the configuration");
    boot::check_files(config.kernel(), config.image())?;
    let (mut machine, reason) = make_machine(&config, &mut timeline)?;
    confine::enter(match machine.kind() {
        MachineKind::Kvm => Kind::Control,
        MachineKind::Qemu => Kind::ControlOfQemu,
    });
    machine.resume()?;
    timeline.step("confine the process and start the vCPUs");
    events.send(&VmEvent::Running { machine: machine.kind(), reason, timings: timeline.into_timings() });
    Ok((machine, control))
}

/// Makes the machine that was asked for, and says why it is this one.
fn make_machine(
    config: &Config,
    timeline: &mut Timeline,
) -> Result<(Box<dyn Machine>, String), SessionError> {
    if config.machine() == MachineChoice::Qemu {
        let machine = QemuMachine::start(config, timeline)?;
        return Ok((Box::new(machine), "it was asked for".to_owned()));
    }
    let Loaded { probed, guest, apart } = kvm::load::load(config)?;
    timeline.step("create the virtual machine, probe it, load the kernel and the image");
    match (probed, config.machine()) {
        (Ok((bare, speed)), choice) => {
            let machine =
                KvmMachine::start(bare, guest?, &apart.map_err(kvm::StartError::Jail)?, config, timeline)?;
            let asked = if choice == MachineChoice::Kvm { "it was asked for; " } else { "" };
            Ok((Box::new(machine), format!("{asked}{}", speed.describe())))
        }
        (Err(unusable), MachineChoice::Kvm) => Err(SessionError::KvmUnusable(unusable)),
        (Err(kvm), _) if !probe::qemu_is_installed() => Err(SessionError::NoMachine { kvm }),
        (Err(unusable), _) => Ok((Box::new(QemuMachine::start(config, timeline)?), unusable.finding)),
    }
}

/// Waits for the machine's end, and serves the control socket meanwhile.
fn watch(
    machine: &mut dyn Machine,
    control: &mut Control,
    events: &EventSocket,
) -> Result<ExitReason, SessionError> {
    loop {
        match wait(machine, control, events)? {
            Woken { ended: true, .. } => return Ok(machine.exit_reason()),
            Woken { runtime: true, .. } if events.peer() == Peer::Gone => break,
            _ => {}
        }
        if control.serve(machine) == Verdict::Stop {
            break;
        }
    }
    machine.stop();
    Ok(ExitReason::Stopped)
}

/// What there is to look at.
struct Woken {
    ended: bool,
    runtime: bool,
}

fn wait(machine: &dyn Machine, control: &Control, events: &EventSocket) -> Result<Woken, SessionError> {
    let ended = machine.ended();
    let others = control.descriptors();
    let mut fds: Vec<PollFd<'_>> = [ended, events.as_fd()]
        .iter()
        .chain(&others)
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let timeout = control.next_deadline().map(until);
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(SessionError::Wait(error.into())),
    }
    let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
    Ok(Woken { ended: ready(0), runtime: ready(1) })
}

fn until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }
}
