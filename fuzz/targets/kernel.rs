//! The loader of kernels and images: the first two bytes say how much of the rest is the kernel.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use sandbox_fuzz::input::Input;
use sandbox_vmm::boot::{Description, Plan, check_files};
use sandbox_vmm::memory::{self, Layout};
use tempfile::TempDir;

thread_local! {
    static FILES: RefCell<TempDir> = RefCell::new(tempfile::tempdir().unwrap());
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let kernel_bytes = input.u16();
    let kernel = input.bytes(kernel_bytes.into());
    let image = [&b"070701"[..], input.bytes(0x10000)].concat();
    FILES.with_borrow(|files| {
        let (kernel_path, image_path) = (files.path().join("kernel"), files.path().join("image"));
        std::fs::write(&kernel_path, kernel).unwrap();
        std::fs::write(&image_path, image).unwrap();
        let _ = check_files(&kernel_path, &image_path);
        let layout = Layout::new(64 << 20);
        let memory = memory::map(layout).unwrap();
        let plan = Plan::new(layout, &kernel_path, &image_path);
        if let Ok(guest) = plan.and_then(|plan| plan.work(&memory).map(|()| plan.guest())) {
            let description = Description { cmdline: "panic=-1", vcpus: 1, lines: &[5] };
            let _ = guest.describe(&memory, layout, &description);
        }
    });
});
