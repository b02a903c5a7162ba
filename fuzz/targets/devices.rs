//! Disk, balloon, vsock and files, each through real rings: the first byte says which.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::net::UnixListener;

use libfuzzer_sys::fuzz_target;
use sandbox_fuzz::driver::Driver;
use sandbox_fuzz::input::Input;
use sandbox_vmm::devices::balloon::Balloon;
use sandbox_vmm::devices::blk::Blk;
use sandbox_vmm::fs::blocks::Blocks;
use sandbox_vmm::fs::{Access, Fs};
use sandbox_vmm::vsock::Vsock;
use sandbox_vmm_api::DiskConfig;
use tempfile::TempDir;

struct Devices {
    drivers: [Driver; 5],
    _directory: TempDir,
}

impl Devices {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("disk"), vec![0x5a; 256 << 10]).unwrap();
        std::fs::create_dir(at("share")).unwrap();
        let disk = |read_only| Box::new(Blk::open(0, &DiskConfig { path: at("disk"), read_only }).unwrap());
        let vsock = Vsock::new(3, UnixListener::bind(at("vsock")).unwrap(), at("vsock")).unwrap();
        let descriptors = File::open("/proc/self/fd").unwrap();
        let files =
            Fs::new("share", &at("share"), Access::ReadWrite, descriptors, Blocks::default()).unwrap();
        let writable = Driver::new(disk(false));
        // A file that is written is locked.
        std::fs::copy(at("disk"), at("disk2")).unwrap();
        let fixed = DiskConfig { path: at("disk2"), read_only: true };
        let drivers = [
            writable,
            Driver::new(Box::new(Blk::open(1, &fixed).unwrap())),
            Driver::new(Box::new(Balloon::new())),
            Driver::new(Box::new(vsock)),
            Driver::new(Box::new(files)),
        ];
        Self { drivers, _directory: directory }
    }
}

thread_local! {
    static DEVICES: RefCell<Devices> = RefCell::new(Devices::new());
}

fuzz_target!(|data: &[u8]| {
    DEVICES.with_borrow_mut(|devices| {
        let mut input = Input::new(data);
        let which = usize::from(input.u8()) % devices.drivers.len();
        let driver = &mut devices.drivers[which];
        driver.bring_up(input.u64());
        driver.run(&mut input);
    });
});
