//! The virtio-mmio transport and the queue, with the simplest device behind them.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use sandbox_fuzz::driver::Driver;
use sandbox_fuzz::input::Input;
use sandbox_vmm::virtio::rng::Rng;

thread_local! {
    static DRIVER: RefCell<Driver> = RefCell::new(Driver::new(Box::new(Rng::default())));
}

fuzz_target!(|data: &[u8]| {
    DRIVER.with_borrow_mut(|driver| {
        let mut input = Input::new(data);
        driver.bring_up(input.u64());
        driver.run(&mut input);
    });
});
