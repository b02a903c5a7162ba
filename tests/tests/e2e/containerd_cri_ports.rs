//! Ports of a pod that are forwarded, by containerd's service for Kubernetes and by what it does itself: it dials the
//! loopback of the pod's network namespace on the host.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Instant;

use sandbox_tests::Kubelet;
use sandbox_tests::kubelet::RUNNING;
use sandbox_tests::network::within;
use sandbox_tests::pattern::{checksum_of, sequence};
use sandbox_tests::place::patience;
use sandbox_tests::process::POLL;
use serde_json::json;

const BULK_BYTES: usize = 4 << 20;

/// Services: for the pod itself, one of each protocol that echoes; one that hears all to its end, one that says a lot, and
/// one that answers a line.
const SERVICES: &str = "probe serve 127.0.0.1:8080 & probe serve [::1]:8081 &
    nc -ll -p 8082 -e probe checksum & nc -ll -p 8083 -e probe pattern 4194304 &
    exec nc -ll -p 8084 -e sh -c 'read line; echo heard $line'";

#[test]
fn ports_of_a_pod_are_reached_from_its_namespace_on_the_host() {
    if let Some(kubelet) = Kubelet::new("cri-ports") {
        reached(&kubelet);
    }
}

#[test]
fn ports_of_a_pod_of_the_sandbox_api_are_reached_as_well() {
    if let Some(kubelet) = Kubelet::with_sandbox_api("cri-api-ports") {
        reached(&kubelet);
    }
}

#[track_caller]
fn reached(kubelet: &Kubelet) {
    let pod = kubelet.pod("pod");
    let id = kubelet.start(&pod, "services", SERVICES, json!({}));
    let listening = "until [ $(netstat -tln | grep -c ':808[0-4] ') = 5 ]; do sleep 0.1; done";
    kubelet.exec(&id, listening).expect_code(0);

    // As `kubectl port-forward` has it done.
    let forward = |port: &str| kubelet.ask(["port-forward", &pod.id, port, "a line\n"]);
    forward("8084").expect_stdout("heard a line\n");
    forward("8089").expect_error(1, &["8089"]);

    let [namespace] = namespaces(kubelet).try_into().expect("there is one pod");
    let dial = |address: &str| {
        let address: SocketAddr = address.parse().expect("an address");
        within(&namespace, || TcpStream::connect_timeout(&address, patience()))
    };
    let dialled = |address: &str| dial(address).unwrap_or_else(|e| panic!("{address}: {e}"));
    for (address, bytes) in [("127.0.0.1:8081", "four to six"), ("[::1]:8080", "six to four")] {
        assert_eq!(exchange(dialled(address), bytes.as_bytes()).expect("an echo"), bytes);
    }

    // Each direction ends by itself, and nothing is lost on the way.
    let sum = exchange(dialled("127.0.0.1:8082"), &sequence(BULK_BYTES)).expect("the service answers");
    assert_eq!(sum.trim(), checksum_of(BULK_BYTES));
    let mut said = Vec::new();
    dialled("127.0.0.1:8083").read_to_end(&mut said).expect("the service speaks");
    assert!(said == sequence(BULK_BYTES), "{} bytes", said.len());

    // Many that say nothing: some are turned away, and the others are no harm to anybody.
    let crowd: Vec<_> = (0..200).map(|_| dial("127.0.0.1:8080")).collect();
    eventually("nobody was turned away", || crowd.iter().any(is_reset).then_some(()));
    drop(crowd);
    let echo = || dial("127.0.0.1:8080").and_then(|connection| exchange(connection, b"after the crowd")).ok();
    assert_eq!(eventually("there is no room again", echo), "after the crowd");

    // Where nobody listens, or nobody of ours is asked.
    let lost = dial("127.0.0.1:8089").and_then(|connection| exchange(connection, b"anybody?")).unwrap_err();
    let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::NotConnected];
    assert!(reset.contains(&lost.kind()), "{lost}");
    let status = kubelet.json(&["pod-status", &pod.id]);
    let own = format!("{}:8080", status["network"]["ip"].as_str().expect("an address"));
    assert_eq!(dial(&own).unwrap_err().kind(), ErrorKind::ConnectionRefused);

    assert_eq!(kubelet.json(&["status", &id])["state"], RUNNING);
    kubelet.end(&pod);
    kubelet.containerd.expect_no_sandbox();
    assert_eq!(namespaces(kubelet), Vec::<PathBuf>::new());
}

/// The network namespaces of pods.
fn namespaces(kubelet: &Kubelet) -> Vec<PathBuf> {
    let entries =
        |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(kubelet.containerd.path("run")).flat_map(|path| entries(path.join("netns"))).collect()
}

fn eventually<T>(otherwise: &str, is_so: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(done) = is_so() {
            return done;
        }
        assert!(Instant::now() < deadline, "{otherwise}");
        std::thread::sleep(POLL);
    }
}

/// Says this to the end, and hears what comes back.
fn exchange(mut connection: TcpStream, bytes: &[u8]) -> io::Result<String> {
    connection.set_read_timeout(Some(patience()))?;
    connection.write_all(bytes)?;
    connection.shutdown(Shutdown::Write)?;
    let mut heard = String::new();
    connection.read_to_string(&mut heard).map(|_| heard)
}

/// Whether a connection was turned away, if not at once.
fn is_reset(connection: &io::Result<TcpStream>) -> bool {
    let heard = match connection {
        Ok(connection) => {
            connection.set_nonblocking(true).and_then(|()| (&*connection).read(&mut [0])).map(|_| ())
        }
        Err(error) => Err(error.kind().into()),
    };
    heard.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}
