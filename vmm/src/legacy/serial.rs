//! The serial port COM1, output only: what the guest writes goes to the console file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::ConsoleFile;
use crate::bus::{Access, BusDevice};

/// The first of its ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// How many ports it has.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt line.
pub const SERIAL_IRQ: u8 = 4;

/// The line to the interrupt controller.
#[derive(Debug)]
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Port = Serial<Line, NoEvents, ConsoleFile>;

/// The serial port.
pub struct SerialPort(Mutex<Port>);

impl SerialPort {
    /// A serial port that writes to a file.
    pub fn new(file: File) -> io::Result<Self> {
        let line = Line(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self(Mutex::new(Serial::new(line, ConsoleFile::new(file)))))
    }

    /// A second handle to what raises its interrupt.
    pub fn interrupt_line(&self) -> io::Result<EventFd> {
        self.lock().interrupt_evt().0.try_clone()
    }

    /// What was written and dropped.
    pub fn statistics(&self) -> BTreeMap<String, u64> {
        let counts = self.lock().writer().counts();
        BTreeMap::from([("bytes".to_owned(), counts.written), ("dropped_bytes".to_owned(), counts.dropped)])
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        for byte in data {
            *byte = port.read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        let mut port = self.lock();
        for &byte in data {
            if let Err(error) = port.write(offset as u8, byte) {
                tracing::debug!(?error, "the console cannot be written");
            }
        }
        Access::Done
    }
}
