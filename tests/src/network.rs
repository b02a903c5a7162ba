//! Networks for sandboxes: network namespaces as engines prepare them, and one that stands for the world outside.
//!
//! ```text
//!   outside: v0, v1 … ◄── veth pairs ──► eth0, eth1 … :inside ──► the sandbox
//! ```
//!
//! Nothing of the host's own network is touched.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use serde_json::json;

use crate::Sandbox;
use crate::place::patience;
use crate::process::POLL;

/// A network namespace of the test. Dropping it checks that nothing of a sandbox is left in it.
pub struct Namespace(String);

/// Two network namespaces and what joins them.
pub struct Net {
    /// The one that a sandbox gets.
    pub inside: Namespace,
    /// The world.
    pub outside: Namespace,
}

impl Net {
    /// Two namespaces that nothing joins yet.
    pub fn new() -> Self {
        Self { inside: Namespace::new(), outside: Namespace::new() }
    }

    /// Joins them by a pair of interfaces, `eth<number>` inside and `v<number>` outside, with the IPv4 addresses
    /// `198.18.NUMBER.2/24` and `.1`, and the IPv6 addresses `fd00:NUMBER::2/64` and `::1`.
    pub fn join(&self, number: u8) {
        let Self { inside, outside } = self;
        outside.ip(&format!("link add v{number} type veth peer name eth{number} netns {}", inside.0));
        for (namespace, interface, host) in
            [(outside, format!("v{number}"), 1), (inside, format!("eth{number}"), 2)]
        {
            namespace.ip(&format!("addr add 198.18.{number}.{host}/24 brd + dev {interface}"));
            namespace.ip(&format!("addr add fd00:{number}::{host}/64 dev {interface} nodad"));
            namespace.ip(&format!("link set {interface} up"));
        }
    }
}

impl Default for Net {
    fn default() -> Self {
        Self::new()
    }
}

impl Namespace {
    /// A new one, with its loopback interface up.
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let namespace =
            Self(format!("sbt-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        output(Command::new("ip").args(["netns", "add", &namespace.0]));
        // A host may have IPv6 switched off for all that is new.
        let script = "for i in all default; do echo 0 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
        output(namespace.command("sh").args(["-c", script]));
        namespace.ip("link set lo up");
        namespace
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// `ip` in it, with the words of a line.
    pub fn ip(&self, words: &str) -> String {
        output(Command::new("ip").args(["-n", &self.0]).args(words.split_whitespace()))
    }

    /// The command line of a program in it, with everything else as it is on the host.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg(program);
        command
    }

    /// Listens in it.
    pub fn listen(&self, address: &str) -> Server {
        let listen = || TcpListener::bind(address).and_then(|l| l.set_nonblocking(true).map(|()| l));
        Server(self.within(listen).unwrap_or_else(|e| panic!("listening on {address}: {e}")))
    }

    /// Connects from it, as soon as somebody listens.
    pub fn connect(&self, address: &str) -> TcpStream {
        let address: SocketAddr = address.parse().expect("an address");
        let deadline = Instant::now() + patience();
        loop {
            match self.within(|| TcpStream::connect_timeout(&address, patience())) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "connecting to {address}: {error}"),
            }
            std::thread::sleep(POLL);
        }
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(Path::new(&self.path()), work)
    }

    /// What a sandbox has made in it.
    pub fn traces(&self) -> Vec<String> {
        let links = self.ip("-o link");
        let queues = output(Command::new("tc").args(["-n", &self.0, "qdisc", "show"]));
        let taps = links.lines().filter(|line| line.contains("sbxtap"));
        taps.chain(queues.lines().filter(|line| line.contains("ingress"))).map(str::to_owned).collect()
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let left = self.traces();
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).output();
        if !std::thread::panicking() {
            assert!(left.is_empty(), "a sandbox left something in its network namespace: {left:#?}");
        }
    }
}

impl Sandbox {
    /// Gives it the network of a namespace.
    pub fn network(self, namespace: &Namespace) -> Self {
        self.network_at(&namespace.path())
    }

    /// Gives it the network namespace at a path.
    pub fn network_at(self, path: &str) -> Self {
        self.config(|config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
            namespaces.retain(|namespace| namespace["type"] != "network");
            namespaces.push(json!({"type": "network", "path": path}));
        })
    }
}

/// Does something in the network namespace at a path.
pub fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(namespace).expect("a namespace");
    let enter = || {
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("a thread can enter a namespace");
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
}

/// Where a sandbox connects to.
pub struct Server(TcpListener);

impl Server {
    /// Takes the next connection.
    ///
    /// # Panics
    ///
    /// When none comes for longer than [`patience`].
    #[track_caller]
    pub fn accept(&self) -> TcpStream {
        let mut wait = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(patience()).expect("a time-out");
        assert_eq!(poll(&mut wait, limit), Ok(1), "nobody connects");
        let (stream, _) = self.0.accept().expect("a connection");
        stream.set_nonblocking(false).expect("a connection");
        stream
    }
}

/// Hears what comes over a connection until its end, and answers then: a `nc` that hears an end sends no more.
pub fn answer(mut stream: TcpStream, bytes: &[u8]) -> String {
    stream.set_read_timeout(Some(patience())).expect("a time-out");
    let mut heard = String::new();
    stream.read_to_string(&mut heard).expect("the other side speaks");
    stream.write_all(bytes).expect("the other side listens");
    heard
}

/// Says something over a connection and hears what comes back.
pub fn ask(mut stream: TcpStream, bytes: &[u8]) -> String {
    stream.set_read_timeout(Some(patience())).expect("a time-out");
    stream.write_all(bytes).expect("the other side listens");
    let mut heard = String::new();
    stream.read_to_string(&mut heard).expect("the other side answers");
    heard
}

/// What a program prints, which has to work.
pub fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out.into_owned()
}
