//! The control socket, with a machine that says yes to everything.

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use sandbox_vmm::control::Control;
use sandbox_vmm::fs::blocks::Blocks;
use sandbox_vmm::machine::{Machine, MachineError};
use sandbox_vmm_api::{ExitReason, MachineKind, Statistics};
use tempfile::TempDir;

struct Willing(std::fs::File, Blocks);

impl Machine for Willing {
    fn kind(&self) -> MachineKind {
        MachineKind::Kvm
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn statistics(&mut self) -> Result<Statistics, MachineError> {
        Err(MachineError::new("count", "there is nothing to count"))
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
    machine: Willing,
    socket: PathBuf,
    _directory: TempDir,
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new({
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control");
        let machine = Willing(std::fs::File::open("/dev/null").unwrap(), Blocks::default());
        Bench { control: Control::listen(&socket).unwrap(), machine, socket, _directory: directory }
    });
}

fuzz_target!(|data: &[u8]| {
    BENCH.with_borrow_mut(|bench| {
        let mut client = UnixStream::connect(&bench.socket).unwrap();
        client.set_nonblocking(true).unwrap();
        // In two parts, as they may come.
        let (first, second) = data.split_at(data.len() / 2);
        for part in [first, second] {
            let _ = client.write_all(part);
            let _ = bench.control.serve(&mut bench.machine);
            let _ = client.read(&mut [0; 4096]);
        }
        drop(client);
        let _ = bench.control.serve(&mut bench.machine);
    });
});
