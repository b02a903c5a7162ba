//! The driver, with a shell script for a machine and the test for an agent, which may be as bad as it likes.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sandbox_protocol::{
    Call, Create, Event as AgentEvent, ExitStatus, Failure as AgentFailure, FailureKind, FromAgent, Hello,
    MAX_TO_GUEST_BYTES, MAX_TO_HOST_BYTES, Outcome, Reply, Request, RootWrites, Stream, StreamHello, Streams,
    VERSION, frame,
};
use sandbox_runtime::monitor::claim;
use sandbox_runtime::sandbox::{
    Answer, Claimed, ContainerPlan, Ending, Ends, Event, Failure, Inbox, MachinePlan, Newcomer,
    Request as Ask, Times, Watcher, run,
};
use sandbox_runtime::state::{SandboxId, StateDirPaths};
use sandbox_runtime::timings::{Moment, Timeline};
use sandbox_vmm_api::{MachineChoice, MachineKind, ShareEntry, VmConfig};

/// A machine that runs until its socket closes.
const GOOD: &str =
    r#"echo '{"event":"running","machine":"qemu","reason":"a test","timings":[]}' >&3; exec cat <&3"#;

/// How long an agent dials in vain.
const DIAL_TIME: Duration = Duration::from_secs(10);

/// A driver reaps every child of its process, so that there is one at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A state root with the plan of a sandbox.
struct Case {
    root: tempfile::TempDir,
    plan: MachinePlan,
    first: Claimed,
    inbox: Inbox,
    _one: MutexGuard<'static, ()>,
}

struct Nobody;

impl Watcher for Nobody {
    fn machine(&mut self, _: MachineKind, _: &str) {}
    fn created(&mut self) {}
    fn started(&mut self) {}
    fn warn(&mut self, _: &str) {}
}

impl Case {
    fn new(machine: &str) -> Self {
        let one = one_at_a_time();
        let root = tempfile::tempdir().unwrap();
        let vmm = root.path().join("machine.sh");
        std::fs::write(&vmm, format!("#!/bin/sh\ncat >/dev/null\n{machine}\n")).unwrap();
        std::fs::set_permissions(&vmm, PermissionsExt::from_mode(0o755)).unwrap();
        let state = root.path().join("state");
        let inbox = Inbox::new();
        let first = claim(container(&state, "box"), inbox.sender()).unwrap();
        Self { root, plan: machine_plan(vmm, &state), first, inbox, _one: one }
    }

    /// Runs the sandbox with this agent. Nothing is left of it.
    fn ending(self, agent: impl FnOnce(Agent) + Send + 'static) -> Ending {
        let state = self.first.plan.root.clone();
        let directory = self.first.plan.directory();
        let playing = std::thread::spawn(move || agent(Agent { directory, secret: Arc::default() }));
        let mut timeline = Timeline::from(Moment::now());
        let ends = Ends::inherited().unwrap();
        let ending = run(self.plan, self.first, ends, &self.inbox, &mut Nobody, &mut timeline);
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 0, "the state directory is left");
        let _ = playing.join();
        drop(self.root);
        ending
    }

    fn failure(self, agent: impl FnOnce(Agent) + Send + 'static) -> (Failure, String) {
        match self.ending(agent) {
            Ending::Failed { failure, message } => (failure, message),
            ending => panic!("{ending:?}"),
        }
    }
}

fn container(state: &Path, name: &str) -> ContainerPlan {
    let id: SandboxId = name.parse().unwrap();
    let spec = serde_json::json!({"ociVersion": "1.2.0",
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}}});
    ContainerPlan {
        id,
        root: state.into(),
        bundle: "/bundle".into(),
        rootfs: "/bundle/rootfs".into(),
        detached: false,
        stand_in: None,
        console_socket: None,
        cgroup: None,
        annotations: Default::default(),
        blocks: vec![],
        network: Default::default(),
        hooks: Default::default(),
        create: Create {
            container: name.into(),
            spec: serde_json::from_value(spec).unwrap(),
            root: RootWrites::Overlay,
            user: None,
            streams: Streams { stdin: true, stdout: true, stderr: true },
            joined: vec![],
            devices: vec![],
            volumes: vec![],
        },
    }
}

fn machine_plan(vmm: PathBuf, state: &Path) -> MachinePlan {
    let directory = state.join("box");
    MachinePlan {
        vmm,
        config: VmConfig {
            machine: MachineChoice::Auto,
            kernel: "/kernel".into(),
            image: "/image".into(),
            memory_mib: 64,
            vcpus: 1,
            cmdline: String::new(),
            vsock: None,
            shares: vec![ShareEntry {
                path: "box".into(),
                source: "/".into(),
                read_only: true,
                id_map: None,
            }],
            disks: vec![],
            nets: vec![],
            balloon: false,
            console: None,
            control_socket: StateDirPaths(&directory).vmm_socket(),
            rates: Default::default(),
            ids: None,
            writable_later: false,
        },
        takes_loopback: false,
        times: Times { answer: Duration::from_secs(60), run: None },
        debug: false,
    }
}

/// The guest's side.
struct Agent {
    directory: PathBuf,
    /// What it was told when it was configured.
    secret: Arc<OnceLock<String>>,
}

impl Agent {
    /// Dials until somebody listens. A driver that has ended will not, and then the play is over.
    fn dial(&self, path: PathBuf) -> UnixStream {
        let deadline = Instant::now() + DIAL_TIME;
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn hello(&self) -> Control {
        let mut stream = self.dial(StateDirPaths(&self.directory).agent_socket());
        let hello = Hello { version: VERSION, kernel: "test".into(), kernel_micros: 1, agent_micros: 1 };
        frame::write(&mut stream, &hello, MAX_TO_HOST_BYTES).unwrap();
        Control(stream, Arc::clone(&self.secret))
    }

    fn configured(&self) -> Control {
        let mut control = self.hello();
        control.answer(Outcome::Done);
        control
    }

    fn stream(&self, stream: Stream) -> UnixStream {
        self.stream_of("box", stream)
    }

    fn stream_of(&self, container: &str, stream: Stream) -> UnixStream {
        let mut connection = self.dial(StateDirPaths(&self.directory).stream_socket());
        let secret = self.secret.get().cloned().unwrap_or_default();
        let hello = StreamHello { container: container.into(), process: String::new(), stream, secret };
        frame::write(&mut connection, &hello, 1024).unwrap();
        connection
    }

    fn streams(&self) -> [UnixStream; 3] {
        [Stream::Stdin, Stream::Stdout, Stream::Stderr].map(|stream| self.stream(stream))
    }
}

struct Control(UnixStream, Arc<OnceLock<String>>);

impl Control {
    fn request(&mut self) -> Option<Request> {
        frame::read(&mut self.0, MAX_TO_GUEST_BYTES).ok().flatten()
    }

    fn say(&mut self, message: &FromAgent) {
        let _ = frame::write(&mut self.0, message, MAX_TO_HOST_BYTES);
    }

    fn answer(&mut self, outcome: Outcome) -> Option<Call> {
        let request = self.request()?;
        if let Call::Configure(configure) = &request.call {
            let _ = self.1.set(configure.stream_secret.clone());
        }
        self.say(&FromAgent::Reply(Reply { id: request.id, outcome }));
        Some(request.call)
    }

    fn exited(&mut self, container: &str, status: ExitStatus) {
        self.say(&FromAgent::Event(AgentEvent::Exited {
            container: container.into(),
            process: String::new(),
            status,
            out_of_memory: false,
            details: Default::default(),
        }));
    }

    fn silent_end(&mut self, container: &str, stream: Stream, lost: Option<String>) {
        self.say(&FromAgent::Event(AgentEvent::SilentEnd {
            container: container.into(),
            process: String::new(),
            stream,
            lost,
        }));
    }

    fn out_of_memory(&mut self, container: &str) {
        self.say(&FromAgent::Event(AgentEvent::OutOfMemory { container: container.into() }));
    }

    /// Until the host hangs up.
    fn linger(mut self) {
        let _ = self.0.read_to_end(&mut Vec::new());
    }
}

fn failed(kind: FailureKind) -> Outcome {
    Outcome::Failed(AgentFailure { kind, message: "no \x1b[31mcolour".into() })
}

#[test]
fn a_process_runs_and_its_exit_is_told_after_its_output() {
    let ending = Case::new(GOOD).ending(|agent| {
        let mut control = agent.hello();
        assert!(matches!(control.answer(Outcome::Done), Some(Call::Configure(_))));
        let streams = agent.streams();
        assert!(matches!(control.answer(Outcome::Done), Some(Call::Create(_))));
        assert!(matches!(control.answer(Outcome::Done), Some(Call::Start { .. })));
        control.exited("box", ExitStatus::Code(3));
        drop(streams);
        control.linger();
    });
    assert_eq!(ending, Ending::Exited { status: ExitStatus::Code(3), out_of_memory: false });
}

#[test]
fn streams_that_nothing_came_of_end_without_a_connection() {
    let ending = Case::new(GOOD).ending(|agent| {
        let mut control = agent.configured();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        for stream in [Stream::Stdout, Stream::Stderr] {
            control.silent_end("box", stream, None);
            // Once more, which changes nothing.
            control.silent_end("box", stream, Some("nonsense".into()));
        }
        control.exited("box", ExitStatus::Code(3));
        control.linger();
    });
    assert_eq!(ending, Ending::Exited { status: ExitStatus::Code(3), out_of_memory: false });
}

#[test]
fn output_that_the_guest_cannot_hand_over_ends_the_sandbox() {
    let (failure, message) = Case::new(GOOD).failure(|agent| {
        let mut control = agent.configured();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        control.silent_end("box", Stream::Stdout, Some("no \x1b[31mcolour".into()));
        control.linger();
    });
    assert_eq!(failure, Failure::Other);
    assert_eq!(message, "the process's standard output is lost: no \\u{1b}[31mcolour");
}

#[test]
fn a_refusal_of_the_agent_has_its_kind_and_no_control_characters() {
    for (kind, expected) in [
        (FailureKind::CommandNotFound, Failure::CommandNotFound),
        (FailureKind::CommandNotExecutable, Failure::CommandNotExecutable),
        (FailureKind::UnknownUser, Failure::Other),
    ] {
        let (failure, message) = Case::new(GOOD).failure(move |agent| {
            let mut control = agent.hello();
            control.answer(Outcome::Done);
            control.answer(failed(kind));
            control.linger();
        });
        assert_eq!(failure, expected);
        assert_eq!(message, "no \\u{1b}[31mcolour");
    }
}

#[test]
fn hostile_agents_are_named_and_ended() {
    type Play = fn(Agent);
    let plays: [(Play, &str); 9] = [
        (|agent| agent.hello().linger_after(&u32::MAX.to_le_bytes()), "over the limit"),
        (|agent| agent.hello().linger_after(&[2, 0, 0, 0, b'{', b'}']), "not what was expected"),
        (
            |agent| {
                let mut control = agent.configured();
                control.say(&FromAgent::Reply(Reply { id: 77, outcome: Outcome::Done }));
                control.linger();
            },
            "request 77, which was never made",
        ),
        (
            |agent| {
                let mut control = agent.configured();
                control.exited("another", ExitStatus::Code(0));
                control.linger();
            },
            "a process that does not exist",
        ),
        (
            |agent| {
                let mut control = agent.configured();
                control.out_of_memory("another");
                control.linger();
            },
            "a lack of memory of a container that does not exist",
        ),
        (
            |agent| {
                let mut control = agent.configured();
                control.silent_end("another", Stream::Stdout, None);
                control.linger();
            },
            "the end of a stream of a container that does not exist",
        ),
        (
            |agent| {
                let mut control = agent.configured();
                for _ in 0..100_000 {
                    control.exited("box", ExitStatus::Code(0));
                }
            },
            "a process that does not exist",
        ),
        (
            |agent| {
                let control = agent.configured();
                for _ in 0..100 {
                    agent.stream(Stream::Terminal);
                }
                control.linger();
            },
            "opening streams that nobody expects",
        ),
        (|agent| drop(agent.hello()), "closed its connection"),
    ];
    for (play, expected) in plays {
        let (failure, message) = Case::new(GOOD).failure(play);
        assert_eq!(failure, Failure::Other);
        assert!(message.contains(expected), "{message}");
    }
}

impl Control {
    fn linger_after(mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
        self.linger();
    }
}

#[test]
fn an_agent_that_is_silent_is_not_waited_for_without_end() {
    let mut case = Case::new(GOOD);
    case.plan.times.answer = Duration::from_millis(100);
    let (_, message) = case.failure(|_| {});
    assert!(message.contains("did not answer") && message.contains("--console"), "{message}");
    let mut case = Case::new(GOOD);
    case.plan.times.answer = Duration::from_millis(500);
    let (_, message) = case.failure(|agent| agent.hello().linger());
    assert!(message.contains("did not take its configuration"), "{message}");
}

#[test]
fn machines_that_end_early_say_why() {
    for (machine, expected) in [
        ("echo broken cpu >&2; exit 4", "broken cpu"),
        // A signal of its own would not end the first process of a namespace.
        ("exit 9", "exit status: 9"),
        (r#"echo '{"event":"exited","reason":{"kind":"failed","message":"no QEMU"}}' >&3"#, "no QEMU"),
        (
            r#"echo '{"event":"exited","reason":{"kind":"panic","console":["oops","the end"]}}' >&3"#,
            "panicked; its last words:\n  oops\n  the end",
        ),
        (r#"echo '{"event":"exited","reason":{"kind":"power-off"}}' >&3"#, "before its agent answered"),
        ("echo nonsense >&3; exec cat <&3", "sandbox-vmm"),
    ] {
        let (failure, message) = Case::new(machine).failure(|_| {});
        assert_eq!(failure, Failure::Other);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_stream_of_somebody_who_does_not_know_the_secret_is_closed_and_forgiven() {
    let ending = Case::new(GOOD).ending(|agent| {
        let mut control = agent.configured();
        for secret in ["", "guess"].into_iter().cycle().take(100) {
            let mut connection = agent.dial(StateDirPaths(&agent.directory).stream_socket());
            let hello = StreamHello {
                container: "box".into(),
                process: String::new(),
                stream: Stream::Stdout,
                secret: secret.into(),
            };
            frame::write(&mut connection, &hello, 1024).unwrap();
            assert_eq!(connection.read(&mut [0]).unwrap_or(0), 0);
        }
        let streams = agent.streams();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        drop(streams);
        control.exited("box", ExitStatus::Code(0));
        control.linger();
    });
    assert_eq!(ending, Ending::Exited { status: ExitStatus::Code(0), out_of_memory: false });
}

#[test]
fn a_machine_that_cannot_be_started_is_named() {
    let mut case = Case::new(GOOD);
    case.plan.vmm = "/nowhere/sandbox-vmm".into();
    let (_, message) = case.failure(|_| {});
    assert!(message.contains("/nowhere/sandbox-vmm") && message.contains("No such file"), "{message}");
}

#[test]
fn what_others_want_ends_a_start() {
    for (event, expected) in [
        (Some(Ask::Interrupt), Failure::Cancelled { signal: 2 }),
        (Some(Ask::Signal { signal: 15, all: false }), Failure::Cancelled { signal: 15 }),
        (None, Failure::Other),
    ] {
        let case = Case::new(GOOD);
        let event = event.map(|request| Event::Request(case.first.serial, request, None));
        case.inbox.sender().send(event.unwrap_or(Event::ClientGone)).unwrap();
        assert_eq!(case.failure(|_| {}).0, expected);
    }
}

#[test]
fn a_second_interrupt_and_a_timeout_cut_a_process_off() {
    let runs_for_ever = |agent: Agent| {
        let mut control = agent.hello();
        control.answer(Outcome::Done);
        let _streams = agent.streams();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        control.linger();
    };
    let mut case = Case::new(GOOD);
    case.plan.times.run = Some(Duration::from_millis(50));
    assert_eq!(case.failure(runs_for_ever).0, Failure::TimedOut);

    let case = Case::new(GOOD);
    let (sender, serial) = (case.inbox.sender(), case.first.serial);
    let (failure, _) = case.failure(move |agent| {
        let mut control = agent.hello();
        control.answer(Outcome::Done);
        let _streams = agent.streams();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        std::thread::sleep(Duration::from_millis(100));
        for _ in 0..2 {
            sender.send(Event::Request(serial, Ask::Interrupt, None)).unwrap();
        }
        assert!(matches!(control.answer(Outcome::Done), Some(Call::Signal { signal: 2, .. })));
        control.linger();
    });
    assert_eq!(failure, Failure::Interrupted);
}

#[test]
fn a_container_that_joins_lives_and_leaves_and_is_not_believed_in_afterwards() {
    let case = Case::new(GOOD);
    let (sender, state) = (case.inbox.sender(), case.first.plan.root.clone());
    let (owner, told) = std::sync::mpsc::sync_channel(2);
    let (failure, message) = case.failure(move |agent| {
        let mut control = agent.configured();
        let _first = agent.streams();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        let place = claim(container(&state, "other"), sender.clone()).unwrap();
        let newcomer = Newcomer { place, ends: Ends::inherited().unwrap(), shares: vec![], owner };
        sender.send(Event::Join(Box::new(newcomer))).unwrap();
        let streams = [Stream::Stdin, Stream::Stdout, Stream::Stderr].map(|s| agent.stream_of("other", s));
        assert!(
            matches!(control.answer(Outcome::Done), Some(Call::Create(create)) if create.container == "other")
        );
        assert!(
            matches!(control.answer(Outcome::Done), Some(Call::Start { container }) if container == "other")
        );
        control.exited("other", ExitStatus::Code(5));
        drop(streams);
        let call = control.answer(Outcome::Done);
        assert!(matches!(call, Some(Call::Delete { container, .. }) if container == "other"));
        assert_eq!(told.recv(), Ok(Answer::Done));
        assert_eq!(told.recv(), Ok(Answer::Exited { status: ExitStatus::Code(5) }));
        assert!(!state.join("other").exists(), "what is not kept is gone before anybody is told");
        control.exited("other", ExitStatus::Code(5));
        control.linger();
    });
    assert_eq!(failure, Failure::Other);
    assert!(message.contains("a process that does not exist"), "{message}");
}

#[test]
fn a_container_that_fails_is_not_the_end_of_the_others() {
    let case = Case::new(GOOD);
    let (sender, state) = (case.inbox.sender(), case.first.plan.root.clone());
    let (owner, told) = std::sync::mpsc::sync_channel(2);
    let ending = case.ending(move |agent| {
        let mut control = agent.configured();
        let first = agent.streams();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        let place = claim(container(&state, "other"), sender.clone()).unwrap();
        let newcomer = Newcomer { place, ends: Ends::inherited().unwrap(), shares: vec![], owner };
        sender.send(Event::Join(Box::new(newcomer))).unwrap();
        assert!(matches!(control.answer(failed(FailureKind::Other)), Some(Call::Create(_))));
        assert!(matches!(control.answer(failed(FailureKind::NotFound)), Some(Call::Delete { .. })));
        assert!(matches!(told.recv(), Ok(Answer::Refused { message }) if message.contains("colour")));
        assert!(told.recv().is_err());
        control.exited("box", ExitStatus::Code(0));
        drop(first);
        control.linger();
    });
    assert_eq!(ending, Ending::Exited { status: ExitStatus::Code(0), out_of_memory: false });
}

#[test]
fn kills_for_lack_of_memory_are_told_to_whoever_watches_and_a_flood_of_them_is_not() {
    let case = Case::new(GOOD);
    let (sender, serial) = (case.inbox.sender(), case.first.serial);
    let (watcher, told) = std::sync::mpsc::sync_channel(1000);
    let ending = case.ending(move |agent| {
        let mut control = agent.configured();
        let streams = agent.streams();
        control.answer(Outcome::Done);
        control.answer(Outcome::Done);
        // Before anybody watches, and then more than anybody wants to know.
        control.out_of_memory("box");
        sender.send(Event::Request(serial, Ask::WatchMemory, Some(watcher))).unwrap();
        assert_eq!(told.recv(), Ok(Answer::OutOfMemory));
        for _ in 0..10_000 {
            control.out_of_memory("box");
        }
        control.exited("box", ExitStatus::Code(0));
        // One that comes late is past caring.
        control.out_of_memory("box");
        drop(streams);
        control.linger();
        let more = told.iter().count();
        assert!((1..1000).contains(&more), "{more}");
    });
    assert_eq!(ending, Ending::Exited { status: ExitStatus::Code(0), out_of_memory: false });
}
