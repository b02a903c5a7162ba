//! The software machine: the guest on QEMU's TCG, with our own devices.
//!
//! QEMU is the CPU, the memory and the board (`-M microvm`); the vsock and the file device are the same code as
//! on the KVM machine, served to it over vhost-user. QEMU is a child of this process that inherits a handful of
//! descriptors, dies with it, and is confined as [`confinement`] says.
//!
//! Guest memory is a memfd of ours. This process copies the guest into it while QEMU starts; QEMU and the devices map
//! it; this process reads the panic log from it when the guest has ended, and how much of it is resident.

mod arguments;
mod child;
mod confinement;
mod entry;
mod error;
mod open;
mod qmp;
mod tsc;
mod vhost_user;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::thread::JoinHandle;

use sandbox_vmm_api::{ExitReason, MachineKind, PANIC_LOG_BYTES, POWER_OFF_VALUE, SHARE_TAG, Statistics};

use crate::boot::Plan;
use crate::config::Config;
use crate::confine::{self, Kind, identity};
use crate::fs::Fs;
use crate::fs::blocks::Blocks;
use crate::jail::{self, Apart};
use crate::legacy::console::ConsoleFile;
use crate::machine::{Machine, MachineError};
use crate::memory::{self, Layout};
use crate::panic_log;
use crate::timeline::Timeline;
use crate::vsock::Vsock;
use arguments::Guest;
use child::Qemu;
pub use error::Error;
use open::{Opened, VsockLink};
use qmp::Qmp;
use vhost_user::Served;

/// The program, as Debian's package `qemu-system-x86` installs it.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU's exit status for a byte that the guest writes to `isa-debug-exit`: twice the byte, plus one.
const POWER_OFF_STATUS: i32 = (POWER_OFF_VALUE as i32) << 1 | 1;

/// The software machine.
pub struct QemuMachine {
    qemu: Qemu,
    qmp: Qmp,
    memory: File,
    layout: Layout,
    devices: Vec<Served>,
    blocks: Blocks,
    console: Option<JoinHandle<()>>,
    stopped: Stopped,
}

/// Whether the machine's end was our doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    No,
    ByUs,
}

impl QemuMachine {
    /// Starts QEMU, with the guest paused, and moves this process into its jail.
    ///
    /// To be called on the process's first thread while there is no other: QEMU is killed when that thread
    /// ends, and a jail is entered by one thread alone.
    pub fn start(config: &Config, timeline: &mut Timeline) -> Result<Self, Error> {
        let tsc = tsc::Measurement::start();
        let layout = Layout::new(config.memory_bytes());
        let plan = Plan::new(layout, config.kernel(), config.image())?;
        let opened = Opened::open(config, plan.guest().entry())?;
        let told = Guest { panic_log: layout.panic_log().start, tsc_khz: tsc.map(tsc::Measurement::finish) };
        let cmdline = arguments::kernel_command_line(config, &told)?;
        if !config.nets().is_empty() && !config.rates().nets.is_none() {
            return Err(Error::NetRate);
        }
        timeline.step("open everything");

        let inherited = opened.inherited();
        let arguments = arguments::qemu(config, &inherited);
        let ids = config.ids();
        let user = ids.map_or(child::NOBODY, |ids| ids.qemu);
        let qemu = Qemu::start(PROGRAM, &arguments, &inherited.all(), user).map_err(start_error)?;
        timeline.step("start qemu");

        let memory = memory::map_file(layout, &opened.memory)?;
        plan.work(&memory)?;
        plan.guest().describe_memory(&memory, layout, entry::TABLES, &cmdline)?;
        drop(memory);
        timeline.step("load the guest");

        let vsock_directory = config.vsock().and_then(|vsock| vsock.socket.parent());
        jail::enter(config.shares(), vsock_directory, &Apart::make()?)?;
        if let Some(ids) = ids {
            identity::take(ids.vmm).map_err(Error::Identity)?;
        }
        timeline.step("enter the jail");

        let machine = Self::serve(qemu, opened, layout, config)?;
        timeline.step("serve devices");
        Ok(machine)
    }

    /// Starts this process's threads, by which QEMU gets what it waits for.
    fn serve(mut qemu: Qemu, opened: Opened, layout: Layout, config: &Config) -> Result<Self, Error> {
        let (rates, access) = (config.rates(), config.share_access());
        let (mut devices, blocks) = (Vec::new(), Blocks::default());
        if let Some(VsockLink { link, cid, listener, dial }) = opened.vsock {
            let vsock =
                Vsock::new(cid, listener, dial).map_err(|error| Error::Socket { what: "vsock", error })?;
            devices.push(Served::start(Box::new(vsock), Kind::Devices, rates.vsock, link.ours)?);
        }
        if let Some(link) = opened.share {
            let root = Path::new(jail::SHARE);
            let fs = Fs::new(SHARE_TAG, root, access, opened.descriptors, blocks.clone())?;
            devices.push(Served::start(Box::new(fs), Kind::Files(access), rates.share, link.ours)?);
        }
        qemu.listen().map_err(Error::Start)?;
        let console = opened.console.map(|(pair, file)| keep_console(pair.ours, file)).transpose()?;
        let qmp = Qmp::new(opened.qmp.ours)
            .map_err(|error| Error::Socket { what: "control", error: io::Error::other(error) })?;
        Ok(Self { qemu, qmp, memory: opened.memory, layout, devices, blocks, console, stopped: Stopped::No })
    }

    /// Waits for what ends with QEMU: the devices' threads, and the rest of the console.
    fn finish(&mut self) {
        self.devices.clear();
        if let Some(console) = self.console.take() {
            let _ = console.join();
        }
    }

    /// The bytes of the panic log, if they can be read.
    fn panic_log(&self) -> Vec<u8> {
        let mut log = vec![0; PANIC_LOG_BYTES as usize];
        // Low memory is where the file begins.
        match self.memory.read_exact_at(&mut log, self.layout.panic_log().start) {
            Ok(()) => log,
            Err(error) => {
                tracing::warn!(%error, "reading the guest's panic log");
                Vec::new()
            }
        }
    }

    /// Why QEMU ended, by its status and its last event.
    fn judge(&mut self, status: ExitStatus) -> ExitReason {
        if self.stopped == Stopped::ByUs {
            return ExitReason::Stopped;
        }
        if status.code() == Some(POWER_OFF_STATUS) {
            return ExitReason::PowerOff;
        }
        match self.qmp.shutdown_reason().as_deref() {
            Some("guest-reset") => self.judge_reset(),
            Some("guest-shutdown") => ExitReason::PowerOff,
            _ => ExitReason::Failed { message: failure(status, &self.qemu.last_words()) },
        }
    }

    /// A panic ends in a triple fault, which is a reset here.
    fn judge_reset(&self) -> ExitReason {
        match panic_log::parse(&self.panic_log()) {
            Some(console) => ExitReason::Panic { console },
            None => ExitReason::Reset,
        }
    }
}

impl Machine for QemuMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Qemu
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.qmp.run("cont").map_err(|error| self.command_error("resuming the guest", &error))
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.qmp.run("stop").map_err(|error| self.command_error("pausing the guest", &error))
    }

    fn statistics(&mut self) -> Result<Statistics, MachineError> {
        /// The unit of `st_blocks`.
        const BLOCK_BYTES: u64 = 512;
        let blocks = self
            .memory
            .metadata()
            .map_err(|error| MachineError::new("measuring guest memory", error))?
            .blocks();
        Ok(Statistics {
            memory_resident_bytes: blocks * BLOCK_BYTES,
            devices: self.devices.iter().map(Served::statistics).collect::<BTreeMap<_, _>>(),
            ..Statistics::default()
        })
    }

    fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn stop(&mut self) {
        self.stopped = Stopped::ByUs;
        self.qemu.kill();
        self.finish();
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.qemu.pidfd()
    }

    fn exit_reason(&mut self) -> ExitReason {
        let status = self.qemu.wait();
        let reason = self.judge(status);
        self.finish();
        reason
    }
}

impl QemuMachine {
    /// A command that failed because QEMU has died says why it died.
    fn command_error(&self, what: &'static str, error: &qmp::Error) -> MachineError {
        let words = self.qemu.last_words();
        if words.is_empty() {
            MachineError::new(what, error)
        } else {
            MachineError::new(what, format!("{error}: {words}"))
        }
    }
}

/// What a QEMU that ended by itself is reported as.
fn failure(status: ExitStatus, last_words: &str) -> String {
    let how = match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("ended with status {code}"),
        (None, None) => "ended".to_owned(),
    };
    if last_words.is_empty() { format!("QEMU {how}") } else { format!("QEMU {how}: {last_words}") }
}

fn start_error(error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound { Error::NotInstalled } else { Error::Start(error) }
}

/// Starts the thread that writes down what the guest's console says, within the file's limits.
fn keep_console(mut console: UnixStream, mut file: ConsoleFile) -> Result<JoinHandle<()>, Error> {
    let keep = move || {
        confine::enter(Kind::Listener);
        // A file that cannot be written does not end the guest; what is left of its console is read and lost.
        if let Err(error) = io::copy(&mut console, &mut file) {
            tracing::warn!(%error, "writing the guest's console");
            let _ = io::copy(&mut console, &mut io::sink());
        }
    };
    std::thread::Builder::new().name("console".to_owned()).spawn(keep).map_err(Error::Start)
}
