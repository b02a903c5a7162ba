//! Metrics of sandboxes, printed and served.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::sys::signal::Signal;
use sandbox_tests::place::{machine, patience};
use sandbox_tests::process::{POLL, Process};
use sandbox_tests::{Sandbox, sandbox};

/// Has the starts of a sandbox counted in a directory of the test.
fn counted(sandbox: Sandbox) -> Sandbox {
    let path = sandbox.directory().join("config.toml");
    let directory = sandbox.directory().join("metrics");
    std::fs::write(&path, format!("metrics.directory = {directory:?}\n")).expect("a file");
    sandbox.host_env("SANDBOX_CONFIG", path)
}

/// The value of the sample whose name and labels have all of these words.
#[track_caller]
fn value(text: &str, words: &[&str]) -> f64 {
    let line =
        text.lines().find(|line| words.iter().all(|word| line.contains(word)) && !line.starts_with('#'));
    let line = line.unwrap_or_else(|| panic!("no {words:?} in\n{text}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

/// What somebody is answered who asks over this connection, as soon as there is one.
fn ask<S: Read + Write>(connect: impl Fn() -> io::Result<S>, request: &str) -> String {
    let deadline = Instant::now() + patience();
    let mut stream = loop {
        match connect() {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(POLL);
    };
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn what_runs_and_how_it_started_is_printed_and_served() {
    let sandbox = counted(sandbox("metrics"));
    sandbox.verb(["metrics"]).expect_code(0).expect_line("sandbox_start_failures_total 0");
    let mut late =
        sandbox.verb_command(["run", "--boot-timeout", "1ms", "--machine", &machine(), "--id", &sandbox.id]);
    Process::spawn(late.arg(sandbox.bundle.path())).wait().expect_code(125);

    let mut run = sandbox.spawn(["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"]);
    run.wait_for_stdout("ready");
    let text = sandbox.verb(["metrics"]).expect_code(0).out();
    let of = format!("sandbox=\"{}\"", sandbox.id);
    let kind = format!("machine=\"{}\"", machine());
    assert_eq!(value(&text, &["sandbox_info{", &of, &kind, "status=\"running\""]), 1.0);
    assert_eq!(value(&text, &["sandbox_containers{", &of]), 1.0);
    assert_eq!(value(&text, &["sandbox_machine_up{", &of]), 1.0);
    assert!(value(&text, &["sandbox_memory_resident_bytes{", &of]) > 1e6, "{text}");
    assert!(
        value(&text, &["sandbox_device_total{", &of, "device=\"vsock\"", "counter=\"opened\""]) > 0.0,
        "{text}"
    );
    assert_eq!(value(&text, &["sandbox_start_seconds_count{", &kind]), 1.0);
    assert_eq!(value(&text, &["sandbox_start_failures_total"]), 1.0);

    let socket = sandbox.directory().join("metrics.sock");
    let listen = format!("unix:{}", socket.display());
    for _ in 0..2 {
        // The second one finds the socket of one that was killed.
        let mut server = Process::spawn(&mut sandbox.verb_command(["metrics", "--listen", &listen]));
        let asked = |request| ask(|| UnixStream::connect(&socket), request);
        let answer = asked("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains(&of), "{answer}");
        assert!(asked("GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(asked("nonsense\r\n\r\n").starts_with("HTTP/1.1 400 "));
        server.kill();
        server.wait();
    }
    // An address of the loopback interface that no other test has.
    let [.., a, b, c] = std::process::id().to_be_bytes();
    let listen = format!("127.{}.{b}.{c}:9744", 100 + a % 100);
    let mut server = Process::spawn(&mut sandbox.verb_command(["metrics", "--listen", &listen]));
    let answer = ask(|| TcpStream::connect(&listen), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains(&of), "{answer}");
    server.kill();
    server.wait();
    run.signal(Signal::SIGTERM);
    run.wait().expect_code(3);
}
