//! What a bare guest is to do, step by step.

/// The numbers of steps, as `kernel.s` has them.
mod number {
    pub const END: u32 = 0;
    pub const WRITE32: u32 = 1;
    pub const WRITE16: u32 = 2;
    pub const WRITE8: u32 = 3;
    pub const COPY: u32 = 4;
    pub const REPORT: u32 = 5;
    pub const WAIT: u32 = 6;
    pub const SAY: u32 = 7;
    pub const FILL: u32 = 8;
    pub const SELECT: u32 = 9;
    pub const SETTLE: u32 = 10;
    pub const HALT: u32 = 11;
    pub const FIND: u32 = 12;
    /// The address counts from the selected device's registers.
    pub const OF_DEVICE: u32 = 0x100;
}

/// Steps for a bare guest. Addresses are physical, and below 4 GiB.
#[derive(Default)]
pub struct Script(Vec<u8>);

impl Script {
    /// No step yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn step(&mut self, number: u32, address: u32, value: u32, mask: u32) {
        self.0.extend([number, address, value, mask].iter().flat_map(|word| word.to_le_bytes()));
    }

    /// Writes to memory.
    pub fn write32(&mut self, address: u32, value: u32) {
        self.step(number::WRITE32, address, value, 0);
    }

    /// Writes to memory.
    pub fn write16(&mut self, address: u32, value: u16) {
        self.step(number::WRITE16, address, value.into(), 0);
    }

    /// Writes to memory.
    pub fn copy(&mut self, address: u32, bytes: &[u8]) {
        let padding = bytes.len().next_multiple_of(16) - bytes.len();
        self.step(number::COPY, address, bytes.len() as u32, padding as u32);
        self.0.extend(bytes);
        self.0.resize(self.0.len() + padding, 0);
    }

    /// Fills memory with a word.
    pub fn fill(&mut self, address: u32, word: u32, words: u32) {
        self.step(number::FILL, address, word, words);
    }

    /// Reports the word at an address as a line of 8 hexadecimal digits.
    pub fn report(&mut self, address: u32) {
        self.step(number::REPORT, address, 0, 0);
    }

    /// Waits until a word is this, as far as the mask goes.
    pub fn wait(&mut self, address: u32, mask: u32, value: u32) {
        self.step(number::WAIT, address, value, mask);
    }

    /// Reports a text.
    pub fn say(&mut self, text: &str) {
        for byte in text.bytes() {
            self.repeat(byte, 1);
        }
    }

    /// Reports a character over and over.
    pub fn repeat(&mut self, byte: u8, times: u32) {
        self.step(number::SAY, 0, byte.into(), times);
    }

    /// Selects the device with this identity, of devices from this address on and so far apart.
    pub fn select_from(&mut self, first: u32, distance: u32, identity: u32) {
        self.step(number::SELECT, first, identity, distance);
    }

    /// Writes a register of the selected device.
    pub fn set(&mut self, register: u32, value: u32) {
        self.step(number::WRITE32 | number::OF_DEVICE, register, value, 0);
    }

    /// Writes one byte, or two, at a register of the selected device.
    pub fn set_narrow(&mut self, register: u32, value: u32) {
        self.step(number::WRITE16 | number::OF_DEVICE, register, value, 0);
        self.step(number::WRITE8 | number::OF_DEVICE, register, value, 0);
    }

    /// Reports a register of the selected device.
    pub fn show(&mut self, register: u32) {
        self.step(number::REPORT | number::OF_DEVICE, register, 0, 0);
    }

    /// Waits for what becomes of a chain: reports `u` when the index of the used ring at an address is no longer
    /// this, `B` when the device wants a reset, `-` when it has looked so often in vain.
    pub fn settle(&mut self, used: u32, index: u16, looks: u32) {
        self.step(number::SETTLE, used, index.into(), looks);
    }

    /// Reports what may be an address of a program on the host: every two words in a row, in a range of memory, of which
    /// the upper one is from 0x5500 to 0x7fff: a line with where they are and what they are, in hexadecimal digits.
    pub fn find_addresses(&mut self, start: u32, bytes: u32) {
        self.step(number::FIND, start, 0, bytes / 4 - 1);
    }

    /// Reports the same of the selected device's registers.
    pub fn find_addresses_in_registers(&mut self, bytes: u32) {
        self.step(number::FIND | number::OF_DEVICE, 0, 0, bytes / 4 - 1);
    }

    /// Goes no further, but does not end the machine.
    pub fn halt(&mut self) {
        self.step(number::HALT, 0, 0, 0);
    }

    /// The bytes, with the end of the machine as the last step.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.step(number::END, 0, 0, 0);
        self.0
    }
}
