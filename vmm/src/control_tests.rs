use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};

use sandbox_vmm_api::{ExitReason, MachineKind, Statistics};

use super::*;
use crate::fs::blocks::Blocks;

/// A machine that does nothing, and refuses to resume.
struct Dummy(UnixStream, Blocks);

impl Machine for Dummy {
    fn kind(&self) -> MachineKind {
        MachineKind::Kvm
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Err(MachineError::new("resuming", "tired"))
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn statistics(&mut self) -> Result<Statistics, MachineError> {
        let devices = BTreeMap::from([("rng".to_owned(), BTreeMap::from([("bytes".to_owned(), 7)]))]);
        Ok(Statistics { vcpu_exits: 3, devices, ..Statistics::default() })
    }

    fn blocks(&self) -> &Blocks {
        &self.1
    }

    fn stop(&mut self) {}

    fn ended(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn exit_reason(&mut self) -> ExitReason {
        ExitReason::Stopped
    }
}

struct Bench {
    control: Control,
    machine: Dummy,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let control = Control::listen(&path).unwrap();
        Self {
            control,
            machine: Dummy(UnixStream::pair().unwrap().0, Blocks::default()),
            path,
            _directory: directory,
        }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn serve(&mut self) -> Verdict {
        self.control.serve(&mut self.machine)
    }

    fn ask(&mut self, line: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(line.as_bytes()).unwrap();
        self.serve();
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).unwrap();
        reply
    }
}

#[test]
fn requests_are_answered() {
    let mut bench = Bench::new();
    assert_eq!(bench.ask("{\"op\":\"pause\"}\n"), "{\"reply\":\"done\"}\n");
    let state = bench.ask("{\"op\":\"state\"}\n");
    assert_eq!(state, "{\"reply\":\"state\",\"state\":\"paused\",\"machine\":\"kvm\"}\n");
    assert!(bench.ask("{\"op\":\"statistics\"}\n").contains("\"bytes\":7"));
    assert!(bench.ask("{\"op\":\"resume\"}\n").contains("resuming: tired"));
}

#[test]
fn a_block_device_comes_as_a_descriptor_with_its_request() {
    let mut bench = Bench::new();
    let line = "{\"op\":\"add-block\"}\n";
    assert!(bench.ask(line).contains("no descriptor came"));

    let file = tempfile::tempfile().unwrap();
    let mut stream = bench.connect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let descriptors = [file.as_fd()];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
    let bytes = &[std::io::IoSlice::new(line.as_bytes())];
    rustix::net::sendmsg(&stream, bytes, &mut control, rustix::net::SendFlags::empty()).unwrap();
    bench.serve();
    // It was for that request, and is not there for the next.
    stream.write_all(line.as_bytes()).unwrap();
    bench.serve();
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "{\"reply\":\"block\",\"number\":0}");
    assert!(lines.next().unwrap().contains("no descriptor came"));
    let removed = bench.ask("{\"op\":\"remove-block\",\"number\":0}\n");
    assert_eq!(removed, "{\"reply\":\"done\"}\n");
}

#[test]
fn nonsense_is_answered_with_an_error() {
    let mut bench = Bench::new();
    for line in ["\n", "[]\n", "{\"op\":\"fly\"}\n"] {
        assert!(bench.ask(line).contains("\"error\""), "{line}");
    }
}

#[test]
fn a_stop_is_acknowledged_and_reported() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    stream.write_all(b"{\"op\":\"stop\"}\n").unwrap();
    assert_eq!(bench.serve(), Verdict::Stop);
    let mut reply = [0; 64];
    assert!(stream.read(&mut reply).unwrap() > 0);
}

#[test]
fn requests_may_come_in_pieces_and_several_at_once() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    stream.write_all(b"{\"op\":").unwrap();
    bench.serve();
    stream.write_all(b"\"pause\"}\n{\"op\":\"pause\"}\n").unwrap();
    bench.serve();
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.next().is_some_and(|line| line.unwrap().contains("done")));
    assert!(lines.next().is_some_and(|line| line.unwrap().contains("done")));
}

#[test]
fn a_line_without_end_closes_its_connection() {
    let mut bench = Bench::new();
    let mut stream = bench.connect();
    stream.write_all(&[b'x'; 5000]).unwrap();
    bench.serve();
    assert!(bench.control.connections.is_empty());
}

#[test]
fn there_are_only_so_many_connections_and_silent_ones_go() {
    let mut bench = Bench::new();
    let streams: Vec<_> = (0..MAX_CONNECTIONS + 3).map(|_| bench.connect()).collect();
    bench.serve();
    assert_eq!(bench.control.connections.len(), MAX_CONNECTIONS);
    for connection in &mut bench.control.connections {
        connection.deadline = Instant::now();
    }
    bench.serve();
    assert!(bench.control.connections.is_empty());
    drop(streams);
}
