//! `sandbox-vmm` driven as the runtime drives it, with a guest whose `/init` is the probe.
//!
//! The probe does the task that the kernel's command line names, and tells how it went over a vsock connection
//! to host port [`REPORT_PORT`]; the test can talk back on it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use sandbox_vmm_api::{
    ControlReply, ControlRequest, EVENT_FD, ExitReason, MachineChoice, Statistics, VmConfig, VmEvent,
    VsockConfig,
};
use tempfile::TempDir;

use crate::initramfs;
use crate::leaks::{self, Trace};
use crate::place::{artefact, binary, machine, patience};
use crate::process::{POLL, Process};
use crate::sandbox::MARK;

/// The host port to which the probe reports.
pub const REPORT_PORT: u32 = 5000;

/// A machine that is about to be started. Its parts can be changed through `config`.
pub struct Plan {
    /// What `sandbox-vmm` will be given.
    pub config: VmConfig,
    /// A directory of the test, for disks and the like.
    pub directory: TempDir,
    name: String,
}

/// Plans a machine whose guest does `task`: one vCPU, 128 MiB, a vsock device and nothing else.
pub fn plan(task: &str) -> Plan {
    let directory = tempfile::Builder::new().prefix("sbt-vmm-").tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("vsock")).expect("a directory");
    initramfs::write(&at("image"), None).expect("an image can be written");
    let config = VmConfig {
        machine: choice(),
        kernel: artefact("SANDBOX_KERNEL", "vmlinux"),
        image: at("image"),
        memory_mib: 128,
        vcpus: 1,
        cmdline: format!("probe={task}"),
        vsock: Some(VsockConfig { cid: 3, socket: at("vsock/vsock.sock") }),
        shares: vec![],
        disks: vec![],
        nets: vec![],
        balloon: false,
        console: None,
        control_socket: at("control.sock"),
        rates: Default::default(),
        ids: None,
        writable_later: false,
    };
    let name = format!("vmm-{task}-{}", directory.path().file_name().expect("a name").to_string_lossy());
    Plan { config, directory, name }
}

fn choice() -> MachineChoice {
    match machine().as_str() {
        "kvm" => MachineChoice::Kvm,
        "qemu" => MachineChoice::Qemu,
        other => panic!("SANDBOX_TEST_MACHINE is {other:?}: kvm or qemu"),
    }
}

impl Plan {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// When `sandbox-vmm` cannot be started; what it reports later is in the machine's events.
    pub fn start(self) -> Machine {
        let report = Report::listen(self.config.vsock.as_ref().map(|vsock| vsock.socket.as_path()));
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(patience())).expect("a time-out");
        let mut command = Command::new(binary("sandbox-vmm"));
        command.env(MARK, &self.name);
        pass_as_event_socket(&mut command, theirs.into());
        let mut process = Process::spawn(&mut command);
        // The descriptor that was moved into the closure must not keep the socket open on our side.
        drop(command);
        process.feed(serde_json::to_vec(&self.config).expect("JSON can be written"));
        Machine { plan: self, process, events: BufReader::new(ours), report }
    }
}

fn pass_as_event_socket(command: &mut Command, socket: OwnedFd) {
    // SAFETY: the closure makes one or two system calls on descriptors that it owns.
    unsafe {
        command.pre_exec(move || {
            let from = socket.as_raw_fd();
            let passed = if from == EVENT_FD {
                libc::fcntl(from, libc::F_SETFD, 0)
            } else {
                libc::dup2(from, EVENT_FD)
            };
            if passed < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
}

/// A machine that was started. It is killed when this is dropped, and must not leave anything.
pub struct Machine {
    /// What it was started from.
    pub plan: Plan,
    process: Process,
    events: BufReader<UnixStream>,
    report: Report,
}

impl Machine {
    /// The next event; none: the VMM closed its event socket.
    #[track_caller]
    pub fn event(&mut self) -> Option<VmEvent> {
        let mut line = String::new();
        self.events.read_line(&mut line).expect("an event comes in time");
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e} in {line:?}")))
    }

    /// Reads the event that says that the vCPUs run.
    ///
    /// # Panics
    ///
    /// When another comes.
    #[track_caller]
    pub fn expect_running(&mut self) -> &mut Self {
        match self.event() {
            Some(VmEvent::Running { .. }) => self,
            other => panic!("the machine does not run: {other:?}\n{}", self.end()),
        }
    }

    /// Reads events up to the last and gives the reason of the end.
    ///
    /// # Panics
    ///
    /// When there is none, or another event follows.
    #[track_caller]
    pub fn expect_exit(&mut self) -> ExitReason {
        loop {
            match self.event() {
                Some(VmEvent::Exited { reason }) => {
                    assert_eq!(self.event(), None, "nothing follows the last event");
                    return reason;
                }
                Some(VmEvent::Running { .. }) => {}
                None => panic!("the VMM ended without saying why\n{}", self.end()),
            }
        }
    }

    /// Sends a request to the control socket and gives the answer.
    #[track_caller]
    pub fn control(&self, request: ControlRequest) -> ControlReply {
        let text = serde_json::to_string(&request).expect("JSON can be written");
        let answer = self.control_line(&text);
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e} in {answer:?}"))
    }

    /// Sends a line to the control socket and gives the line that comes back.
    #[track_caller]
    pub fn control_line(&self, line: &str) -> String {
        let mut socket = UnixStream::connect(&self.plan.config.control_socket).expect("the control socket");
        socket.set_read_timeout(Some(patience())).expect("a time-out");
        // It may refuse the rest of a line that is too long.
        let _ = writeln!(socket, "{line}");
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer).expect("an answer");
        answer
    }

    /// The machine's counters.
    #[track_caller]
    pub fn statistics(&self) -> Statistics {
        match self.control(ControlRequest::Statistics) {
            ControlReply::Statistics(statistics) => statistics,
            other => panic!("not statistics: {other:?}"),
        }
    }

    /// Waits until the probe has reported `text`.
    ///
    /// # Panics
    ///
    /// When the machine ends before, or it takes too long.
    #[track_caller]
    pub fn wait_for_report(&mut self, text: &str) {
        let deadline = Instant::now() + patience();
        while !self.report().contains(text) {
            if !self.process.running() && !self.report().contains(text) {
                let report = self.report();
                panic!("the machine ended before {text:?} was reported: {report:?}, {:?}", self.event());
            }
            assert!(Instant::now() < deadline, "{text:?} was not reported: {:?}", self.report());
            std::thread::sleep(POLL);
        }
    }

    /// What the probe reported so far.
    pub fn report(&self) -> String {
        String::from_utf8_lossy(&self.report.text.lock().expect("no reader panics")).into_owned()
    }

    /// Says a line to the probe.
    #[track_caller]
    pub fn tell(&self, line: &str) {
        let mut connection = self.report.connection.lock().expect("no reader panics");
        let connection = connection.as_mut().expect("the probe has connected");
        writeln!(connection, "{line}").expect("the probe listens");
    }

    /// Closes the host's side of the probe's connection, upon which the probe powers its machine off.
    pub fn close_report(&self) {
        self.report.stop();
    }

    /// The VMM's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What its processes are recognised by.
    pub fn trace(&self) -> Trace {
        Trace { id: self.plan.name.clone(), directory: self.plan.directory.path().to_owned() }
    }

    /// Closes the event socket, as a runtime that dies does.
    pub fn hang_up(&mut self) {
        self.events.get_ref().shutdown(std::net::Shutdown::Both).expect("a socket can be shut down");
    }

    /// Where a connection to guest ports starts.
    pub fn vsock(&self) -> PathBuf {
        self.plan.config.vsock.as_ref().expect("the machine has a vsock device").socket.clone()
    }

    /// What the VMM itself wrote, after its end.
    #[track_caller]
    pub fn end(&mut self) -> crate::Outcome {
        self.process.wait_with_stdin_open()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.process.running() {
            self.process.kill();
        }
        let trace = self.trace();
        self.report.stop();
        match std::thread::panicking() {
            true => leaks::kill_all(&trace),
            false => leaks::expect_no_process(&trace),
        }
    }
}

/// The host's side of the probe's connection.
struct Report {
    text: Arc<Mutex<Vec<u8>>>,
    connection: Arc<Mutex<Option<UnixStream>>>,
}

impl Report {
    fn listen(socket: Option<&Path>) -> Self {
        let report = Self { text: Arc::default(), connection: Arc::default() };
        let Some(socket) = socket else { return report };
        let listener = UnixListener::bind(format!("{}_{REPORT_PORT}", socket.display())).expect("a listener");
        let (text, connection) = (report.text.clone(), report.connection.clone());
        std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            *connection.lock().expect("no reader panics") = stream.try_clone().ok();
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                text.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
            }
        });
        report
    }

    /// Ends the connection, so that the reader ends.
    fn stop(&self) {
        if let Some(stream) = &*self.connection.lock().expect("no reader panics") {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
