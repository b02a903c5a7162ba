//! The few PC devices that a guest without ACPI still touches.
//!
//! - the keyboard controller at ports 0x60 and 0x64, by which the kernel resets the machine;
//! - the clock chip at ports 0x70 and 0x71, which a kernel may ask for the time before it knows KVM's clock;
//! - the power switch at [`POWER_OFF_PORT`];
//! - a serial port, where a console was asked for: see [`console`] and [`serial`].

pub mod console;
pub mod serial;

use sandbox_vmm_api::POWER_OFF_VALUE;

use crate::bus::{Access, BusDevice};

pub use sandbox_vmm_api::POWER_OFF_PORT;

/// The first port of the keyboard controller, and how many there are up to its command port.
pub const KEYBOARD_PORT: u16 = 0x60;
/// The ports from data to command.
pub const KEYBOARD_PORTS: u16 = 5;
/// The index port of the clock chip; the data port follows.
pub const CLOCK_PORT: u16 = 0x70;
/// The clock's ports.
pub const CLOCK_PORTS: u16 = 2;

/// From the data port to the command port.
const COMMAND_OFFSET: u64 = 4;
/// The command that pulses the processor's reset line.
const RESET_COMMAND: u8 = 0xfe;

/// A keyboard controller without a keyboard: its buffers are always empty, and it can reset the machine.
#[derive(Debug)]
pub struct KeyboardController;

impl BusDevice for KeyboardController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let idle = offset == 0 || offset == COMMAND_OFFSET;
        data.fill(if idle { 0 } else { 0xff });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        if offset == COMMAND_OFFSET && data == [RESET_COMMAND] { Access::Reset } else { Access::Done }
    }
}

/// A clock chip whose registers are all zero: no update is ever in progress, so nobody waits for it.
#[derive(Debug)]
pub struct Clock;

impl BusDevice for Clock {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Access {
        Access::Done
    }
}

/// The power switch.
#[derive(Debug)]
pub struct PowerSwitch;

impl BusDevice for PowerSwitch {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Access {
        if data == [POWER_OFF_VALUE] { Access::PowerOff } else { Access::Done }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_at_its_port_resets() {
        assert_eq!(KeyboardController.write(4, &[0xfe]), Access::Reset);
        assert_eq!(KeyboardController.write(0, &[0xfe]), Access::Done);
        assert_eq!(KeyboardController.write(4, &[0xd1]), Access::Done);
        assert_eq!(KeyboardController.write(4, &[0xfe, 0xfe]), Access::Done);
    }

    #[test]
    fn the_keyboard_controller_is_never_busy() {
        let mut status = [0xff];
        KeyboardController.read(4, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn only_the_agreed_byte_cuts_the_power() {
        assert_eq!(PowerSwitch.write(0, &[POWER_OFF_VALUE]), Access::PowerOff);
        assert_eq!(PowerSwitch.write(0, &[0]), Access::Done);
    }
}
