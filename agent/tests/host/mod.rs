//! The host's side of the protocol, for an agent that runs in namespaces of its own on this machine.

// Each test program uses its own part of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use sandbox_protocol::{
    Call, Create, Event, Exec, ExitStatus, Failure, FromAgent, Hello, MAX_STREAM_HELLO_BYTES,
    MAX_TO_GUEST_BYTES, MAX_TO_HOST_BYTES, Outcome, Processes, Reply, Request, RootWrites, Stats, Stream,
    StreamHello, Streams, frame,
};
use serde_json::{Value, json};

/// A static program that is many.
const BUSYBOX: &str = "/usr/bin/busybox";

pub const ALL: Streams = Streams { stdin: true, stdout: true, stderr: true };

/// An agent, and all that it has said.
pub struct Guest {
    pub hello: Hello,
    agent: Child,
    cgroup: TestCgroup,
    control: UnixStream,
    listener: UnixListener,
    directory: tempfile::TempDir,
    next_request: u64,
    events: VecDeque<Event>,
    connections: BTreeMap<(String, String, Stream), UnixStream>,
}

/// How a process ended and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub out_of_memory: bool,
}

impl Guest {
    /// Starts an agent; `None`, with the reason on standard error, where this machine does not allow it.
    pub fn start() -> Option<Self> {
        Self::start_in("domain")
    }

    /// The same where the kernel refuses every process in a container's cgroup: below a threaded one, that is
    /// invalid.
    pub fn start_without_processes() -> Option<Self> {
        Self::start_in("threaded")
    }

    fn start_in(cgroup_type: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: making containers needs root");
            return None;
        }
        // Not under /tmp or /run: the agent mounts its own there.
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let socket = directory.path().join("host");
        let listen = |port: u32| UnixListener::bind(format!("{}_{port}", socket.display())).unwrap();
        let (control, listener) =
            (listen(sandbox_protocol::CONTROL_PORT), listen(sandbox_protocol::STREAM_PORT));
        let cgroup = TestCgroup::make()?;
        if cgroup_type != "domain" {
            std::fs::write(cgroup.inner.join("cgroup.type"), cgroup_type).unwrap();
        }
        let agent = Command::new("sh")
            .args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec unshare \"$@\""])
            .arg(&cgroup.inner)
            .args(["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"])
            .arg(env!("CARGO_BIN_EXE_sandbox-agent"))
            .arg("--host-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (mut control, _) = control.accept().unwrap();
        let hello = frame::read(&mut control, MAX_TO_HOST_BYTES).unwrap().unwrap();
        Some(Self {
            hello,
            agent,
            cgroup,
            control,
            listener,
            directory,
            next_request: 0,
            events: VecDeque::new(),
            connections: BTreeMap::new(),
        })
    }

    /// Makes a root file system with busybox in it.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        let root = self.directory.path().join(name);
        for dir in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        for tool in [
            "sh", "cat", "echo", "id", "ls", "stat", "sleep", "true", "mkdir", "mknod", "head", "wc", "tty",
            "stty", "hostname", "env", "pwd", "grep", "touch", "kill", "dd", "md5sum", "readlink", "yes",
            "mount",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(tool)).unwrap();
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\n")
            .unwrap();
        std::fs::write(root.join("etc/group"), "root:x:0:\nweb:x:44:\nadm:x:4:web\n").unwrap();
        root
    }

    pub fn send(&mut self, call: Call) -> u64 {
        self.next_request += 1;
        let request = Request { id: self.next_request, call };
        frame::write(&mut self.control, &request, MAX_TO_GUEST_BYTES).unwrap();
        self.next_request
    }

    pub fn reply(&mut self, wanted: u64) -> Result<(), Failure> {
        match self.outcome(wanted) {
            Outcome::Done => Ok(()),
            Outcome::Failed(failure) => Err(failure),
            other => panic!("an answer to something else: {other:?}"),
        }
    }

    /// The answer to a request, of whatever kind.
    pub fn outcome(&mut self, wanted: u64) -> Outcome {
        loop {
            match self.next() {
                FromAgent::Event(event) => self.events.push_back(event),
                FromAgent::Reply(Reply { id, outcome }) if id == wanted => return outcome,
                FromAgent::Reply(other) => panic!("an answer to nothing: {other:?}"),
            }
        }
    }

    fn next(&mut self) -> FromAgent {
        frame::read(&mut self.control, MAX_TO_HOST_BYTES).unwrap().expect("the agent is gone")
    }

    pub fn call(&mut self, call: Call) -> Result<(), Failure> {
        let id = self.send(call);
        self.reply(id)
    }

    pub fn create(
        &mut self,
        id: &str,
        spec: &Value,
        root: RootWrites,
        user: Option<&str>,
    ) -> Result<(), Failure> {
        let request = self.send_create(id, spec, root, user);
        self.reply(request)
    }

    pub fn send_create(&mut self, id: &str, spec: &Value, root: RootWrites, user: Option<&str>) -> u64 {
        self.send(Call::Create(Box::new(Create {
            container: id.into(),
            spec: serde_json::from_value(spec.clone()).unwrap(),
            root,
            user: user.map(str::to_owned),
            streams: ALL,
            joined: Vec::new(),
            devices: Vec::new(),
            volumes: Vec::new(),
        })))
    }

    pub fn start_container(&mut self, id: &str) -> Result<(), Failure> {
        self.call(Call::Start { container: id.into() })
    }

    pub fn exec(&mut self, id: &str, process: &str, spec: Value) -> Result<(), Failure> {
        self.exec_with(id, process, spec, ALL)
    }

    pub fn exec_with(
        &mut self,
        id: &str,
        process: &str,
        spec: Value,
        streams: Streams,
    ) -> Result<(), Failure> {
        self.call(Call::Exec(Box::new(Exec {
            container: id.into(),
            process: process.into(),
            spec: serde_json::from_value(spec).unwrap(),
            streams,
        })))
    }

    pub fn signal(&mut self, id: &str, process: &str, signal: i32, all: bool) -> Result<(), Failure> {
        self.call(Call::Signal { container: id.into(), process: process.into(), signal, all })
    }

    pub fn pause(&mut self, id: &str) -> Result<(), Failure> {
        self.call(Call::Pause { container: id.into() })
    }

    pub fn resume(&mut self, id: &str) -> Result<(), Failure> {
        self.call(Call::Resume { container: id.into() })
    }

    pub fn update(&mut self, id: &str, resources: Value) -> Result<(), Failure> {
        let resources = Box::new(serde_json::from_value(resources).unwrap());
        self.call(Call::Update { container: id.into(), resources })
    }

    pub fn processes(&mut self, id: &str) -> Processes {
        let request = self.send(Call::Processes { container: id.into() });
        match self.outcome(request) {
            Outcome::Processes(processes) => processes,
            other => panic!("no processes: {other:?}"),
        }
    }

    pub fn stats(&mut self, id: &str) -> Stats {
        let request = self.send(Call::Stats { container: id.into() });
        match self.outcome(request) {
            Outcome::Stats(stats) => *stats,
            other => panic!("no statistics: {other:?}"),
        }
    }

    /// A file of a container's cgroup.
    pub fn cgroup_file(&self, id: &str, file: &str) -> String {
        std::fs::read_to_string(self.cgroup.inner.join("pod").join(id).join(file)).unwrap()
    }

    /// Whether a container has a cgroup.
    pub fn has_cgroup(&self, id: &str) -> bool {
        self.cgroup.inner.join("pod").join(id).exists()
    }

    pub fn delete(&mut self, id: &str) -> Result<(), Failure> {
        self.call(Call::Delete { container: id.into(), share: None })
    }

    /// A stream that the agent has dialled or is about to dial; one that ended without that is at its end.
    pub fn stream(&mut self, id: &str, process: &str, stream: Stream) -> UnixStream {
        let wanted = (id.to_owned(), process.to_owned(), stream);
        loop {
            if let Some(found) = self.connections.remove(&wanted) {
                return found;
            }
            if let Some(lost) = self.take_silent_end(&wanted) {
                assert_eq!(lost, None);
                return UnixStream::pair().unwrap().0;
            }
            let sources = [self.listener.as_fd(), self.control.as_fd()];
            let mut ready = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
            poll(&mut ready, None).unwrap();
            let [dialled, said] = ready.map(|source| !source.revents().is_empty());
            if dialled {
                self.accept();
            } else if said {
                self.hear();
            }
        }
    }

    fn accept(&mut self) {
        let (mut connection, _) = self.listener.accept().unwrap();
        let hello: StreamHello = frame::read(&mut connection, MAX_STREAM_HELLO_BYTES).unwrap().unwrap();
        self.connections.insert((hello.container, hello.process, hello.stream), connection);
    }

    fn hear(&mut self) {
        match self.next() {
            FromAgent::Event(event) => self.events.push_back(event),
            FromAgent::Reply(reply) => panic!("an answer to nothing: {reply:?}"),
        }
    }

    /// Waits until a stream has ended without a connection. Returns why what came of it is lost, if it is.
    pub fn silent_end(&mut self, id: &str, process: &str, stream: Stream) -> Option<String> {
        let wanted = (id.to_owned(), process.to_owned(), stream);
        loop {
            if let Some(lost) = self.take_silent_end(&wanted) {
                return lost;
            }
            self.hear();
        }
    }

    fn take_silent_end(&mut self, (id, of, wanted): &(String, String, Stream)) -> Option<Option<String>> {
        let of_wanted = |event: &Event| match event {
            Event::SilentEnd { container, process, stream, lost }
                if (container, process, stream) == (id, of, wanted) =>
            {
                Some(lost.clone())
            }
            _ => None,
        };
        let at = self.events.iter().position(|event| of_wanted(event).is_some())?;
        of_wanted(&self.events.remove(at)?)
    }

    /// Has nobody be there for streams any more.
    pub fn stop_listening(&self) {
        let socket = self.directory.path().join("host");
        std::fs::remove_file(format!("{}_{}", socket.display(), sandbox_protocol::STREAM_PORT)).unwrap();
    }

    /// Waits for the end of a process; other ends are kept.
    pub fn exited(&mut self, id: &str, wanted: &str) -> (ExitStatus, bool) {
        let is_wanted = |event: &Event| match event {
            Event::Exited { container, process, .. } => {
                (container.as_str(), process.as_str()) == (id, wanted)
            }
            Event::SilentEnd { .. } | Event::OutOfMemory { .. } => false,
        };
        loop {
            if let Some(at) = self.events.iter().position(is_wanted) {
                let Some(Event::Exited { status, out_of_memory, .. }) = self.events.remove(at) else {
                    continue;
                };
                return (status, out_of_memory);
            }
            self.hear();
        }
    }

    /// Waits for the end of a process that gets no input, and returns all it wrote.
    pub fn finish(&mut self, id: &str, process: &str) -> Ended {
        drop(self.stream(id, process, Stream::Stdin));
        let read = |mut stream: UnixStream| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                stream.read_to_end(&mut text).unwrap();
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        let stdout = read(self.stream(id, process, Stream::Stdout));
        let stderr = read(self.stream(id, process, Stream::Stderr));
        let (status, out_of_memory) = self.exited(id, process);
        Ended { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap(), out_of_memory }
    }

    /// Creates, starts, waits for and deletes a container.
    pub fn run(&mut self, id: &str, spec: &Value) -> Ended {
        self.create(id, spec, RootWrites::Overlay, None).unwrap();
        self.start_container(id).unwrap();
        let ended = self.finish(id, "");
        self.delete(id).unwrap();
        ended
    }

    /// The standard output of a shell script in a container, which must end well.
    pub fn script(&mut self, spec: &Value, script: &str) -> String {
        let mut spec = spec.clone();
        spec["process"]["args"] = json!(["sh", "-c", script]);
        let ended = self.run("script", &spec);
        assert_eq!(
            (ended.status, ended.stderr.as_str()),
            (ExitStatus::Code(0), ""),
            "{script}: {}",
            ended.stdout
        );
        ended.stdout
    }

    /// Writes bytes that are no frame.
    pub fn say(&mut self, bytes: &[u8]) {
        self.control.write_all(bytes).unwrap();
    }

    /// Closes the control connection.
    pub fn hang_up(&mut self) {
        self.control.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Waits for the agent to end by itself.
    pub fn ends(mut self) {
        assert!(self.agent.wait().unwrap().success());
    }

    /// Ends the agent as the host does.
    pub fn power_off(mut self) {
        self.send(Call::PowerOff);
        let mut rest = Vec::new();
        self.control.read_to_end(&mut rest).unwrap();
        assert!(self.agent.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        self.cgroup.remove();
    }
}

/// A cgroup that stands in for the root of a guest's hierarchy.
///
/// It is the inner one of two: the outer one gives it no controllers, so that the agent, which enables all that
/// its root has, may stay in it.
struct TestCgroup {
    outer: PathBuf,
    inner: PathBuf,
}

impl TestCgroup {
    fn make() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let Some(hierarchy) = fields.find(|fields| fields[2] == "cgroup2") else {
            eprintln!("SKIPPED: no cgroup2 hierarchy is mounted");
            return None;
        };
        let name = format!("agent-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let outer = Path::new(hierarchy[1]).join(name);
        let inner = outer.join("root");
        std::fs::create_dir_all(&inner).unwrap();
        Some(Self { outer, inner })
    }

    fn remove(&self) {
        let _ = std::fs::write(self.outer.join("cgroup.kill"), "1");
        while std::fs::read_to_string(self.outer.join("cgroup.events"))
            .is_ok_and(|e| e.contains("populated 1"))
        {
            std::thread::yield_now();
        }
        remove_tree(&self.outer);
    }
}

fn remove_tree(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    std::fs::remove_dir(path).unwrap();
}

/// A configuration as engines write it.
pub fn spec(root: &Path, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(args),
        "root": {"path": root},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                           {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/none", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"]
        }
    })
}

pub fn process(args: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/bin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_MKNOD", "CAP_CHOWN"],
            "effective": ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_MKNOD", "CAP_CHOWN"],
            "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_MKNOD", "CAP_CHOWN"]
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}],
        "noNewPrivileges": true
    })
}

/// Writes to a stream of a process's input and ends it.
pub fn write_and_end(mut stream: UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}
