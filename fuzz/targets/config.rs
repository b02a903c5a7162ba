//! Configurations: that of a bundle (`config.json`), and that of a machine.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use sandbox_runtime::spec::{Bundle, MachineSizes, Overrides};
use sandbox_vmm::config::Config;
use tempfile::TempDir;

thread_local! {
    static BUNDLE: RefCell<TempDir> = RefCell::new({
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("rootfs")).unwrap();
        bundle
    });
}

fuzz_target!(|data: &[u8]| {
    let _ = Config::read(data);
    BUNDLE.with_borrow(|bundle| {
        std::fs::write(bundle.path().join("config.json"), data).unwrap();
        if let Ok(bundle) = Bundle::load(bundle.path(), &Overrides::default()) {
            let _ = MachineSizes::default().machine(bundle.spec());
        }
    });
});
