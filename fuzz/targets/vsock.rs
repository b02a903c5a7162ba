//! Packets of the guest and what hosts do meanwhile, against the connections of the vsock device.

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use sandbox_fuzz::driver::Driver;
use sandbox_fuzz::input::Input;
use sandbox_vmm::vsock::Vsock;
use tempfile::TempDir;

/// The most steps of an input.
const STEPS: usize = 64;
/// The most connections that a host keeps.
const KEPT: usize = 16;

struct Bench {
    driver: Driver,
    listener: UnixListener,
    socket: PathBuf,
    hosts: Vec<UnixStream>,
    _directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        let device = Vsock::new(3, UnixListener::bind(&socket).unwrap(), socket.clone()).unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock_1")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { driver: Driver::new(Box::new(device)), listener, socket, hosts: vec![], _directory: directory }
    }

    fn begin(&mut self) {
        self.hosts.clear();
        while self.listener.accept().is_ok() {}
        self.driver.bring_up(u64::MAX);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 8 {
            0..=3 => {
                let packet = packet(input);
                self.driver.offer(1, &[&packet], &[]);
                self.driver.notify(1);
            }
            4 => {
                let room = u32::from(input.u16() % 0x1000);
                self.driver.offer(0, &[], &[room]);
                self.driver.notify(0);
            }
            5 => {
                if let Ok((stream, _)) = self.listener.accept() {
                    self.keep(stream);
                }
            }
            6 => {
                let said = input.bytes(24);
                if let Ok(mut stream) = UnixStream::connect(&self.socket) {
                    let _ = stream.write_all(said);
                    self.keep(stream);
                }
            }
            _ => self.play_host(input),
        }
        self.driver.ready();
    }

    fn keep(&mut self, stream: UnixStream) {
        let _ = stream.set_nonblocking(true);
        self.hosts.truncate(KEPT - 1);
        self.hosts.push(stream);
    }

    /// A host program writes, reads or leaves.
    fn play_host(&mut self, input: &mut Input<'_>) {
        let (what, which) = (input.u8(), usize::from(input.u8()));
        if self.hosts.is_empty() {
            return;
        }
        let which = which % self.hosts.len();
        match what % 3 {
            0 => drop(self.hosts.swap_remove(which)),
            1 => {
                let len = input.u8();
                let _ = self.hosts[which].write(input.bytes(len.into()));
            }
            _ => {
                let _ = self.hosts[which].read(&mut [0; 4096]);
            }
        }
    }
}

/// A packet of the guest whose fields are mostly sensible.
fn packet(input: &mut Input<'_>) -> Vec<u8> {
    let mode = input.u8();
    let odd = |bit: u8| mode & (1 << bit) != 0;
    let mut bytes = if odd(0) { input.u64() } else { 3 }.to_le_bytes().to_vec();
    bytes.extend(if odd(1) { input.u64() } else { 2 }.to_le_bytes());
    bytes.extend(u32::from(input.u8() % 4).to_le_bytes());
    bytes.extend(if odd(2) { input.u32() } else { 1 }.to_le_bytes());
    let op = input.u8();
    let len = usize::from(input.u8());
    let (flags, buf_alloc, fwd_cnt) = (input.u8(), input.u32(), input.u32());
    let data = input.bytes(len);
    bytes.extend(if odd(3) { input.u32() } else { data.len() as u32 }.to_le_bytes());
    bytes.extend(if odd(4) { input.u16() } else { 1 }.to_le_bytes());
    bytes.extend(u16::from(op % 9).to_le_bytes());
    for word in [u32::from(flags), buf_alloc, fwd_cnt] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(data);
    bytes
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

fuzz_target!(|data: &[u8]| {
    BENCH.with_borrow_mut(|bench| {
        let mut input = Input::new(data);
        bench.begin();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            bench.step(&mut input);
        }
    });
});
