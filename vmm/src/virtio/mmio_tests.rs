use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::virtio::chain::{Indirect, Limits, Served, serve};

/// A device that answers every chain, and counts what is called.
#[derive(Default)]
struct Calls {
    activated: AtomicUsize,
    reset: AtomicUsize,
    notified: AtomicUsize,
    ready: AtomicUsize,
}

struct Probe(Arc<Calls>);

impl VirtioDevice for Probe {
    fn name(&self) -> &str {
        "probe"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8 + 1);
    }

    fn activate(&mut self, _features: u64) {
        self.0.activated.fetch_add(1, Ordering::SeqCst);
    }

    fn reset(&mut self) {
        self.0.reset.fetch_add(1, Ordering::SeqCst);
    }

    fn notified(
        &mut self,
        queue: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.0.notified.fetch_add(1, Ordering::SeqCst);
        let limits = Limits { queue, max_bytes: 64, max_buffers: 4, indirect: Indirect::Refused };
        serve(queues[queue], memory, &limits, |_| Ok(Served::Done(0)))
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![0]
    }

    fn ready(
        &mut self,
        _fd: RawFd,
        _queues: &mut [&mut Queue],
        _memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.0.ready.fetch_add(1, Ordering::SeqCst);
        Ok(Signals::NONE)
    }
}

const STATUS: u64 = 0x70;
const TABLES: [(u64, u32); 3] = [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)];

struct Bench {
    device: MmioDevice,
    calls: Arc<Calls>,
    memory: GuestMemory,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let calls = Arc::new(Calls::default());
        let device = MmioDevice::new(Box::new(Probe(Arc::clone(&calls))), memory.clone(), None).unwrap();
        Self { device, calls, memory }
    }

    fn write(&self, offset: u64, value: u32) {
        assert_eq!(self.device.write(offset, &value.to_le_bytes()), Access::Done);
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Brings the device up with queue 0 at the given tables.
    fn bring_up(&self, tables: [(u64, u32); 3]) {
        for status in [1, 3] {
            self.write(STATUS, status);
        }
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(STATUS, 11);
        for (offset, address) in tables {
            self.write(offset, address);
        }
        self.write(0x44, 1);
        self.write(STATUS, 15);
    }

    fn interrupts(&self) -> u64 {
        self.device.interrupt_line().read().unwrap_or(0)
    }

    fn offer_chain(&self) {
        use vm_memory::Bytes;
        self.memory.write_obj(0x8000u64, GuestAddress(0x1000)).unwrap();
        self.memory.write_obj(4u32, GuestAddress(0x1008)).unwrap();
        self.memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
    }

    fn count(&self, which: impl Fn(&Calls) -> &AtomicUsize) -> usize {
        which(&self.calls).load(Ordering::SeqCst)
    }
}

#[test]
fn nothing_is_run_before_the_driver_is_ready() {
    let bench = Bench::new();
    bench.device.run_notified(0);
    bench.device.run_ready(0);
    assert_eq!((bench.count(|c| &c.notified), bench.count(|c| &c.ready)), (0, 0));
}

#[test]
fn a_driver_that_is_ready_finds_the_device_caught_up() {
    let bench = Bench::new();
    bench.bring_up(TABLES);
    assert_eq!(bench.read(STATUS), 15);
    assert_eq!(bench.device.activated_event().read().unwrap(), 1);
    bench.device.run_activated();
    // Queue 1 was not set up and is not run.
    let counts = [bench.count(|c| &c.activated), bench.count(|c| &c.ready), bench.count(|c| &c.notified)];
    assert_eq!(counts, [1, 1, 1]);
}

#[test]
fn a_served_chain_interrupts_until_it_is_acknowledged() {
    let bench = Bench::new();
    bench.bring_up(TABLES);
    bench.offer_chain();
    bench.device.run_notified(0);
    assert_eq!((bench.read(INTERRUPT_STATUS), bench.interrupts()), (1, 1));
    bench.write(INTERRUPT_ACK, 1);
    assert_eq!(bench.read(INTERRUPT_STATUS), 0);
    bench.device.run_notified(0);
    assert_eq!((bench.read(INTERRUPT_STATUS), bench.interrupts()), (0, 0));
}

#[test]
fn tables_that_are_nowhere_or_crooked_stop_the_device() {
    let bad = [
        [(0x80, 0xfff0), TABLES[1], TABLES[2]],
        [TABLES[0], (0x90, 0xffff_f000), TABLES[2]],
        [TABLES[0], TABLES[1], (0xa0, 0xffc0)],
        [(0x80, 0x1008), TABLES[1], TABLES[2]],
        [TABLES[0], (0x90, 0x2001), TABLES[2]],
        [TABLES[0], TABLES[1], (0xa0, 0x3002)],
    ];
    for (index, tables) in bad.into_iter().enumerate() {
        let bench = Bench::new();
        bench.bring_up(tables);
        assert_eq!(bench.read(STATUS), 15 | 0x40, "case {index}");
        assert_eq!(bench.read(INTERRUPT_STATUS), CONFIGURATION);
        assert_eq!(bench.count(|c| &c.activated), 0);
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    use vm_memory::Bytes;
    let bench = Bench::new();
    bench.bring_up(TABLES);
    bench.memory.write_obj(500u16, GuestAddress(0x2002)).unwrap();
    bench.device.run_notified(0);
    assert_eq!((bench.read(STATUS), bench.read(INTERRUPT_STATUS)), (15 | 0x40, CONFIGURATION));
    bench.device.run_notified(0);
    assert_eq!(bench.count(|c| &c.notified), 1);

    bench.write(STATUS, 0);
    assert_eq!((bench.read(STATUS), bench.read(INTERRUPT_STATUS), bench.count(|c| &c.reset)), (0, 0, 1));
    bench.memory.write_obj(0u16, GuestAddress(0x2002)).unwrap();
    bench.bring_up(TABLES);
    bench.offer_chain();
    bench.device.run_notified(0);
    assert_eq!((bench.read(STATUS), bench.read(INTERRUPT_STATUS)), (15, USED_RING));
}

#[test]
fn a_queue_that_is_moved_while_in_use_stays_where_it_is() {
    let bench = Bench::new();
    bench.bring_up(TABLES);
    for (offset, _) in TABLES {
        bench.write(offset, 0xdead_0000);
    }
    bench.write(0x38, 2);
    bench.write(0x44, 0);
    bench.offer_chain();
    bench.device.run_notified(0);
    assert_eq!(bench.read(INTERRUPT_STATUS), USED_RING);
}

#[test]
fn registers_are_words_and_the_configuration_is_bytes() {
    let bench = Bench::new();
    let mut half = [0xee; 2];
    bench.device.read(0, &mut half);
    assert_eq!(half, [0, 0]);
    let mut crooked = [0xee; 4];
    bench.device.read(2, &mut crooked);
    assert_eq!(crooked, [0; 4]);
    bench.device.write(STATUS, &[1]);
    assert_eq!(bench.read(STATUS), 0);
    let mut byte = [0];
    bench.device.read(0x105, &mut byte);
    assert_eq!(byte, [6]);
}

#[test]
fn notifications_of_queues_that_are_not_there_go_nowhere() {
    let bench = Bench::new();
    bench.bring_up(TABLES);
    bench.write(QUEUE_NOTIFY, 7);
    bench.write(QUEUE_NOTIFY, 1);
    assert_eq!(bench.device.notify_events()[1].read().unwrap(), 1);
    assert!(bench.device.notify_events()[0].read().is_err());
}

/// An address that is often near the end of memory, or of all addresses.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..0x1_1000, 0xf000u64..0x1_0010, (u64::MAX - 0x100)..=u64::MAX, any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// A queue is live only with all its tables in memory, aligned, and of a size that can be.
    #[test]
    fn a_live_queue_lies_in_memory(
        size in prop_oneof![0u16..20, any::<u16>()],
        descriptors in address(),
        available in address(),
        used in address(),
    ) {
        const MEMORY: u64 = 0x1_0000;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let plan = QueuePlan { max_size: 1024, size, ready: true, descriptors, available, used };
        if live_queue(&plan, true, &memory).is_ok() {
            prop_assert!(size.is_power_of_two() && size <= 1024);
            let size = u64::from(size);
            for (table, bytes, alignment) in
                [(descriptors, 16 * size, 16), (available, 6 + 2 * size, 2), (used, 6 + 8 * size, 4)]
            {
                prop_assert!(table.checked_add(bytes).is_some_and(|end| end <= MEMORY));
                prop_assert_eq!(table % alignment, 0);
            }
        }
    }
}
