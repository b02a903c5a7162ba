//! The kernel's command line on the `kvm` machine.

use crate::memory::Extent;
use crate::panic_log;
use crate::virtio::mmio::WINDOW_BYTES;

/// Where a virtio-mmio device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Its page.
    pub address: u64,
    /// Its interrupt line.
    pub irq: u8,
}

/// Whether the machine has a serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// The kernel's console is on it.
    Serial,
    /// It has none.
    None,
}

/// The words, separated by blanks.
///
/// - `panic=-1 reboot=k`: after a panic or on a reboot, reset at once through the keyboard controller, whose
///   stub ends the machine.
/// - those of [`panic_log::words`]: on a panic, leave the log where the VMM finds it.
/// - `swiotlb=noforce`: no bounce buffers, which no device here needs, in guests of more than 3 GiB.
/// - `noreplace-smp`: a guest with one vCPU keeps its lock prefixes; taking them out, one patch each, costs more
///   than they do.
/// - `quiet` where there is no console: nobody reads it there, and the log that a panic leaves is whole anyway.
/// - `random.trust_cpu=on`: the entropy pool is ready from the first instruction; virtio-rng adds to it.
pub fn kernel_cmdline(panic_log: Extent, console: Console, slots: &[MmioSlot], extra: &str) -> String {
    let mut words = vec!["panic=-1 reboot=k swiotlb=noforce noreplace-smp random.trust_cpu=on".to_owned()];
    words.push(panic_log::words(panic_log.start));
    match console {
        Console::Serial => words.push("console=ttyS0".to_owned()),
        Console::None => words.push("8250.nr_uarts=0 quiet".to_owned()),
    }
    for slot in slots {
        words.push(format!("virtio_mmio.device={:#x}@{:#x}:{}", WINDOW_BYTES, slot.address, slot.irq));
    }
    if !extra.is_empty() {
        words.push(extra.to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_announced_in_order() {
        let slots = [MmioSlot { address: 0xd000_0000, irq: 5 }, MmioSlot { address: 0xd000_1000, irq: 6 }];
        let text = kernel_cmdline(Extent { start: 0x3ff0000, len: 0x10000 }, Console::None, &slots, "extra");
        assert!(
            text.contains("virtio_mmio.device=0x1000@0xd0000000:5 virtio_mmio.device=0x1000@0xd0001000:6")
        );
        assert!(text.contains("ramoops.mem_address=0x3ff0000 ramoops.mem_size=0x10000"));
        assert!(text.ends_with(" extra") && !text.contains("console="));
    }

    #[test]
    fn a_console_is_named_only_when_there_is_one() {
        let text = kernel_cmdline(Extent { start: 0, len: 1 }, Console::Serial, &[], "");
        assert!(text.ends_with("console=ttyS0"));
    }
}
