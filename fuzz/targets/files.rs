//! FUSE messages against the file server. What they reach is a directory of their own; a file beside it stays what
//! it is.

#![no_main]

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::symlink;

use libfuzzer_sys::fuzz_target;
use sandbox_fuzz::driver::Driver;
use sandbox_fuzz::input::Input;
use sandbox_vmm::fs::blocks::Blocks;
use sandbox_vmm::fs::{Access, Fs};
use tempfile::TempDir;

/// The most messages of an input.
const MESSAGES: usize = 16;
const CANARY: &str = "unharmed";

/// `INIT` of a client that can do everything.
const INIT: u32 = 26;

/// The node of the first block device.
const BLOCK: u64 = 1 << 62;

struct Bench {
    driver: Driver,
    directory: TempDir,
    runs: u32,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("share")).unwrap();
        fs::write(at("canary"), CANARY).unwrap();
        fs::write(at("share/file"), "content").unwrap();
        symlink("../canary", at("share/link")).unwrap();
        // What is open for reading only is not written to, whatever the guest says.
        let blocks = Blocks::default();
        blocks.add(File::open(at("canary")).unwrap()).unwrap();
        let descriptors = File::open("/proc/self/fd").unwrap();
        let device = Fs::new("share", &at("share"), Access::ReadWrite, descriptors, blocks).unwrap();
        Self { driver: Driver::new(Box::new(device)), directory, runs: 0 }
    }

    fn send(&mut self, message: &[u8], room: u32) {
        self.driver.offer(1, &[message], &[room]);
        self.driver.notify(1);
    }

    fn run(&mut self, input: &mut Input<'_>) {
        self.driver.bring_up(u64::MAX);
        let body: Vec<u8> =
            [7u32, 41, 1 << 17, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send(&message(INIT, 0, &[&body[..], &[0; 48]].concat()), 256);
        for _ in 0..MESSAGES {
            if input.is_empty() {
                break;
            }
            let (opcode, node, len, room) = (input.u8(), input.u8(), input.u8(), input.u16());
            let node = match node {
                255 => input.u64(),
                240..255 => BLOCK,
                node => u64::from(node % 16),
            };
            let body = input.bytes(len.into());
            let mut bytes = message(u32::from(opcode % 54), node, body);
            if opcode >= 216 {
                bytes[..4].copy_from_slice(&input.u32().to_le_bytes());
            }
            self.send(&bytes, u32::from(room % 0x2000));
        }
        self.look();
    }

    /// Looks at the canary now and then, and removes what has gathered.
    fn look(&mut self) {
        self.runs += 1;
        if self.runs % 256 == 0 {
            let canary = fs::read_to_string(self.directory.path().join("canary")).unwrap();
            assert_eq!(canary, CANARY);
            assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
        }
        if self.runs % 4096 == 0 {
            *self = Self::new();
        }
    }
}

fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut message = ((40 + body.len()) as u32).to_le_bytes().to_vec();
    message.extend(opcode.to_le_bytes());
    message.extend(7u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    message.resize(40, 0);
    message.extend(body);
    message
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

fuzz_target!(|data: &[u8]| BENCH.with_borrow_mut(|bench| bench.run(&mut Input::new(data))));
