//! A driver for a device behind its virtio-mmio registers, with rings in guest memory, that does what an input says.

use sandbox_vmm::bus::BusDevice;
use sandbox_vmm::virtio::mmio::MmioDevice;
use sandbox_vmm::virtio::{GuestMemory, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

/// Guest memory.
pub const MEMORY_BYTES: u64 = 1 << 20;

/// The size of each ring, and what it has of memory: table, available ring, used ring.
const SIZE: u16 = 16;
const RING_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

/// Where buffers are.
const DATA: u64 = 0x1_0000;

/// The most steps of an input.
const STEPS: usize = 64;

/// The most bytes of a buffer that is offered properly.
const BUFFER_BYTES: u16 = 0x2000;

/// A device and its driver.
pub struct Driver {
    device: MmioDevice,
    memory: GuestMemory,
    queues: u16,
    features: u64,
    offered: Vec<u16>,
}

impl Driver {
    /// Puts a device behind registers.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap();
        let queues = device.queue_sizes().len() as u16;
        let features = device.features();
        let device = MmioDevice::new(device, memory.clone(), None).unwrap();
        Self { device, memory, queues, features, offered: vec![0; usize::from(queues)] }
    }

    fn set(&self, register: u64, value: u32) {
        let _ = self.device.write(register, &value.to_le_bytes());
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Resets the device and sets its queues up as they should be.
    pub fn bring_up(&mut self, features: u64) {
        self.set(0x70, 0);
        self.write(0, &[0; DATA as usize]);
        self.offered.fill(0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        // Of what is offered, and VERSION_1 in any case: the device comes up.
        let accepted = features & self.features | 1 << 32;
        for (select, half) in [(0, accepted as u32), (1, (accepted >> 32) as u32)] {
            self.set(0x24, select);
            self.set(0x20, half);
        }
        self.set(0x70, 11);
        for queue in 0..self.queues {
            let base = RING_BYTES as u32 * u32::from(queue);
            self.set(0x30, queue.into());
            self.set(0x38, SIZE.into());
            for (register, address) in
                [(0x80, base), (0x90, base + AVAILABLE as u32), (0xa0, base + USED as u32)]
            {
                self.set(register, address);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
        self.device.run_activated();
    }

    /// Offers a chain of buffers as it should be: their bytes, and for those to be written their lengths.
    pub fn offer(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) {
        let queue = queue % self.queues;
        let base = RING_BYTES * u64::from(queue);
        let offered = self.offered[usize::from(queue)];
        let count = readable.len() + writable.len();
        let first = offered % SIZE;
        let mut address = DATA + 0x2_0000 * u64::from(queue);
        for index in 0..count {
            let slot = (first + index as u16) % SIZE;
            let (len, write) = match readable.get(index) {
                Some(bytes) => {
                    self.write(address, bytes);
                    (bytes.len() as u32, 0)
                }
                None => (writable[index - readable.len()], 2),
            };
            let next = u16::from(index + 1 < count);
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend((write | next).to_le_bytes());
            descriptor.extend(((slot + 1) % SIZE).to_le_bytes());
            self.write(base + 16 * u64::from(slot), &descriptor);
            address += u64::from(len).next_multiple_of(64);
        }
        self.write(base + AVAILABLE + 4 + 2 * u64::from(offered % SIZE), &first.to_le_bytes());
        self.offer_more(queue, 1);
    }

    fn offer_more(&mut self, queue: u16, count: u16) {
        let index = &mut self.offered[usize::from(queue)];
        *index = index.wrapping_add(count);
        let index = *index;
        self.write(RING_BYTES * u64::from(queue) + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Notifies the device of a queue.
    pub fn notify(&self, queue: u16) {
        self.device.run_notified(usize::from(queue % self.queues));
    }

    /// Tells the device that its descriptors are ready.
    pub fn ready(&self) {
        for &fd in self.device.event_fds() {
            self.device.run_ready(fd);
        }
    }

    /// Does what an input says.
    pub fn run(&mut self, input: &mut Input<'_>) {
        for _ in 0..STEPS {
            if input.is_empty() {
                return;
            }
            self.step(input);
        }
    }

    /// Does one step of an input.
    pub fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 10 {
            // Anything at all, in the rings' own memory.
            0 => {
                let (at, len) = (input.u16(), input.u8());
                self.write(u64::from(at % (RING_BYTES as u16 * self.queues.min(8))), input.bytes(len.into()));
            }
            1 => {
                let (register, value) = (input.u16(), input.u32());
                self.set(u64::from(register & 0x1fc), value);
            }
            2 => self.notify(input.u16()),
            3 => self.ready(),
            4 => self.bring_up(input.u64()),
            5 => {
                let (register, len) = (input.u16(), input.u8() % 9);
                let mut data = [0xaa; 8];
                self.device.read(register.into(), &mut data[..usize::from(len)]);
            }
            6 => {
                let (register, len) = (input.u16(), input.u8() % 9);
                let _ = self.device.write(register.into(), input.bytes(len.into()));
            }
            7 => {
                let (queue, count) = (input.u16() % self.queues, input.u16());
                self.offer_more(queue, count);
                self.notify(queue);
            }
            // A proper chain.
            _ => {
                let (queue, shape, len) = (input.u16(), input.u8(), input.u16() % BUFFER_BYTES);
                let (first, second) = (input.u8(), input.u8());
                let readable: Vec<&[u8]> = (0..shape % 3)
                    .map(|part| input.bytes(usize::from([first, second][usize::from(part)])))
                    .collect();
                let writable = vec![u32::from(len); usize::from(shape / 3 % 3)];
                if !readable.is_empty() || !writable.is_empty() {
                    self.offer(queue, &readable, &writable);
                    self.notify(queue);
                }
            }
        }
    }
}
