//! The two address spaces of a machine, memory-mapped and port I/O, and who answers at which address.
//!
//! Where nobody is, writes vanish and reads give all ones, as on a real bus.

use std::sync::Arc;

/// What answers at a range of addresses. vCPU threads call it at the same time.
pub trait BusDevice: Send + Sync {
    /// Reads at an offset from the range's start; fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at an offset from the range's start.
    fn write(&self, offset: u64, data: &[u8]) -> Access;
}

/// What a write leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The guest goes on.
    Done,
    /// The guest has asked for its power to be cut.
    PowerOff,
    /// The guest has asked for a reset.
    Reset,
}

struct Range {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space.
#[derive(Default)]
pub struct Bus {
    /// In order of their starts.
    ranges: Vec<Range>,
}

impl Bus {
    /// Puts a device at a range. Ranges that overlap are a mistake of the machine's layout.
    pub fn attach(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) {
        let at = self.ranges.partition_point(|range| range.start < start);
        debug_assert!(self.find(start).is_none() && self.find(start + len - 1).is_none());
        self.ranges.insert(at, Range { start, len, device });
    }

    /// Reads for a vCPU.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((range, offset)) => range.device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes for a vCPU.
    pub fn write(&self, address: u64, data: &[u8]) -> Access {
        match self.find(address) {
            Some((range, offset)) => range.device.write(offset, data),
            None => Access::Done,
        }
    }

    fn find(&self, address: u64) -> Option<(&Range, u64)> {
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = address - range.start;
        (offset < range.len).then_some((range, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);

    impl BusDevice for Constant {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _offset: u64, data: &[u8]) -> Access {
            if data == [self.0] { Access::Reset } else { Access::Done }
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        bus.attach(0x20, 4, Arc::new(Constant(0x40)));
        bus.attach(0x10, 4, Arc::new(Constant(0x30)));
        bus
    }

    fn read(address: u64) -> u8 {
        let mut data = [0];
        bus().read(address, &mut data);
        data[0]
    }

    #[test]
    fn each_address_has_one_owner() {
        assert_eq!([read(0x10), read(0x13), read(0x20), read(0x23)], [0x30, 0x33, 0x40, 0x43]);
    }

    #[test]
    fn nobody_reads_as_all_ones() {
        for address in [0, 0xf, 0x14, 0x1f, 0x24, u64::MAX] {
            assert_eq!(read(address), 0xff, "{address:#x}");
        }
        assert_eq!(bus().write(0x14, &[0x30]), Access::Done);
    }

    #[test]
    fn a_write_reaches_its_device() {
        assert_eq!(bus().write(0x12, &[0x30]), Access::Reset);
    }
}
