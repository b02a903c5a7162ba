//! The MP table (Intel MultiProcessor Specification 1.4): how many processors there are, and how interrupt
//! lines reach them.
//!
//! It is what a kernel without ACPI goes by. A floating pointer leads to a table of a header and entries: a
//! processor each, the ISA bus, the I/O APIC, those of its interrupt lines that are in use, and the two local
//! lines of every processor. The kernel sets up every line that it finds here, with several exits each, so there
//! is none without a device.
//!
//! The pointer is found by its signature. Linux looks for it first in the first KiB, 16 bytes at a time, and maps
//! and unmaps a page for each look: at address 0, it is found at once.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::virtio::GuestMemory;

/// Where the table lies: firmware's place, which no memory map gives to the guest.
const START: u64 = 0xf_0000;
/// Where the pointer to it lies.
const POINTER: u64 = 0;
const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// Kinds of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const LINE: u8 = 3;
const LOCAL_LINE: u8 = 4;

/// Kinds of interrupts.
const VECTORED: u8 = 0;
const NON_MASKABLE: u8 = 1;
const EXTERNAL: u8 = 3;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const ALL_PROCESSORS: u8 = 0xff;
const ISA_BUS: u8 = 0;

/// Writes the table for so many processors and these interrupt lines.
pub fn write(memory: &GuestMemory, vcpus: u8, lines: &[u8]) -> Result<(), BootError> {
    let failed = |_| BootError::Table("MP table");
    let table = table(vcpus, lines);
    memory.write_slice(&table, GuestAddress(START)).map_err(failed)?;
    memory.write_slice(&pointer(), GuestAddress(POINTER)).map_err(failed)
}

fn pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((START as u32).to_le_bytes());
    pointer.extend([1, SPECIFICATION, 0]);
    pointer.resize(POINTER_BYTES, 0);
    set_checksum(&mut pointer, 10);
    pointer
}

fn table(vcpus: u8, lines: &[u8]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        // Signature and feature flags, the last 16 bytes, are read from the processor itself.
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[PROCESSOR, id, APIC_VERSION, flags]);
        add(&processor);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let io_apic_id = vcpus;
    let address = IO_APIC.to_le_bytes();
    add(&[IO_APIC_ENTRY, io_apic_id, APIC_VERSION, ENABLED, address[0], address[1], address[2], address[3]]);
    for &line in lines {
        add(&[LINE, VECTORED, 0, 0, ISA_BUS, line, io_apic_id, line]);
    }
    add(&[LOCAL_LINE, EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[LOCAL_LINE, NON_MASKABLE, 0, 0, ISA_BUS, 0, ALL_PROCESSORS, 1]);

    let length = (HEADER_BYTES + entries.len()) as u16;
    let mut table = b"PCMP".to_vec();
    table.extend(length.to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"SANDBOX MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    set_checksum(&mut table, 7);
    table
}

/// Makes all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    #[test]
    fn checksums_hold() {
        assert_eq!(pointer().len(), 16);
        assert!(sums_to_zero(&pointer()));
        for vcpus in [1, 2, 254] {
            assert!(sums_to_zero(&table(vcpus, &[5, 6])), "{vcpus}");
        }
    }

    #[test]
    fn the_header_states_its_own_length_and_count() {
        let table = table(3, &[4, 5]);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 3 + 1 + 1 + 2 + 2);
        assert_eq!(table.len(), HEADER_BYTES + 3 * 20 + 6 * 8);
    }

    #[test]
    fn only_the_first_processor_boots() {
        let table = table(2, &[]);
        assert_eq!(table[HEADER_BYTES + 3], ENABLED | BOOT_PROCESSOR);
        assert_eq!(table[HEADER_BYTES + 20 + 3], ENABLED);
    }

    #[test]
    fn the_largest_table_fits_below_one_mebibyte() {
        assert!(START + table(254, &[5; 19]).len() as u64 <= 1 << 20);
    }
}
