use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::devices::testing::{Driver, Part, memory, notify};

const PAGE: usize = 4096;
/// Where guest memory is that no ring of a test lies in.
const FREE: u64 = 12 << 20;

struct Bench {
    balloon: Balloon,
    memory: GuestMemory,
    drivers: [Driver; 3],
}

fn bench(features: u64) -> Bench {
    let mut balloon = Balloon::new();
    balloon.activate(features);
    let memory = memory();
    let drivers = [0, 1, 2].map(|number| Driver::new(&memory, number, QUEUE_SIZE));
    Bench { balloon, memory, drivers }
}

impl Bench {
    fn send(&mut self, queue: usize, parts: &[Part<'_>]) {
        let offered = self.drivers[queue].offer(parts);
        let signals = notify(&mut self.balloon, queue, &mut self.drivers, &self.memory).unwrap();
        assert!(signals.has(queue));
        assert_eq!(self.drivers[queue].used(), [(offered.head, 0)]);
    }

    fn fill(&self, pages: usize) {
        self.memory.write_slice(&vec![0xaa; pages * PAGE], GuestAddress(FREE)).unwrap();
    }

    /// Which of the first pages hold only zeroes.
    fn zeroed(&self, pages: usize) -> Vec<bool> {
        let mut bytes = vec![0; pages * PAGE];
        self.memory.read_slice(&mut bytes, GuestAddress(FREE)).unwrap();
        bytes.chunks(PAGE).map(|page| page.iter().all(|byte| *byte == 0)).collect()
    }

    /// Which of the first pages the host holds memory for.
    fn resident(&self, pages: usize) -> Vec<bool> {
        let region = self.memory.iter().next().unwrap();
        let mut state = vec![0u8; pages];
        // SAFETY: the range is mapped, and the vector has a byte for each page of it.
        let outcome = unsafe {
            let start = region.as_ptr().add(FREE as usize);
            libc::mincore(start.cast(), pages * PAGE, state.as_mut_ptr())
        };
        assert_eq!(outcome, 0);
        state.iter().map(|page| page & 1 != 0).collect()
    }

    fn counter(&self, name: &str) -> u64 {
        self.balloon.statistics()[name]
    }
}

const ALL: u64 = 1 << F_PAGE_REPORTING | 1 << F_PAGE_POISON;

#[test]
fn reported_memory_goes_back_to_the_host() {
    let mut bench = bench(ALL);
    bench.fill(4);
    assert_eq!(bench.resident(4), [true; 4]);
    bench.send(
        REPORTING,
        &[Part::WriteAt(FREE, PAGE as u32), Part::WriteAt(FREE + 2 * PAGE as u64, PAGE as u32)],
    );
    assert_eq!(bench.resident(4), [false, true, false, true]);
    assert_eq!(bench.zeroed(4), [true, false, true, false]);
    assert_eq!((bench.counter("reported_bytes"), bench.balloon.reported_bytes()), (8192, 8192));
}

#[test]
fn only_whole_pages_are_released() {
    let mut bench = bench(ALL);
    bench.fill(4);
    // From the last byte of page 0 to the first of page 3.
    bench.send(REPORTING, &[Part::WriteAt(FREE + PAGE as u64 - 1, 2 * PAGE as u32 + 2)]);
    assert_eq!(bench.zeroed(4), [false, true, true, false]);
    for len in [0, 1, PAGE as u32 - 1] {
        bench.send(REPORTING, &[Part::WriteAt(FREE + 1, len)]);
    }
    assert_eq!(bench.counter("reported_bytes"), 2 * PAGE as u64);
}

#[test]
fn a_report_outside_memory_breaks_the_ring() {
    for (address, len) in [(u64::MAX - 4095, 4096), (1 << 40, 4096), (FREE, 512 << 20), (FREE, u32::MAX)] {
        let mut bench = bench(ALL);
        bench.drivers[REPORTING].offer(&[Part::WriteAt(address, len)]);
        notify(&mut bench.balloon, REPORTING, &mut bench.drivers, &bench.memory).unwrap_err();
        assert_eq!(bench.counter("reported_bytes"), 0);
    }
}

#[test]
fn memory_to_be_read_is_not_released() {
    let mut bench = bench(ALL);
    bench.send(REPORTING, &[Part::Read(&[1; 2 * PAGE])]);
    assert_eq!(bench.counter("reported_bytes"), 0);
}

#[test]
fn a_poison_other_than_zero_keeps_the_pages() {
    for (features, poison, released) in
        [(ALL, 0xaaaa_aaaa, 0), (ALL, 0, PAGE as u64), (1 << F_PAGE_REPORTING, 0xaaaa_aaaa, PAGE as u64)]
    {
        let mut bench = bench(features);
        bench.balloon.write_config(POISON_OFFSET, &u32::to_le_bytes(poison));
        bench.fill(1);
        bench.send(REPORTING, &[Part::WriteAt(FREE, PAGE as u32)]);
        assert_eq!(bench.counter("reported_bytes"), released, "{features:#x} {poison:#x}");
    }
}

#[test]
fn pages_are_inflated_in_runs_and_one_by_one() {
    let mut bench = bench(ALL);
    bench.fill(8);
    let first = (FREE / PAGE as u64) as u32;
    let list: Vec<u8> =
        [first, first + 1, first + 5, first + 3].into_iter().flat_map(u32::to_le_bytes).collect();
    let (head, tail) = list.split_at(7);
    bench.send(INFLATE, &[Part::Read(head), Part::Read(tail)]);
    assert_eq!(bench.zeroed(8), [true, true, false, true, false, true, false, false]);
    assert_eq!(bench.counter("inflated_bytes"), 4 * PAGE as u64);
    bench.send(DEFLATE, &[Part::Read(&list)]);
    bench.fill(8);
    assert_eq!(bench.zeroed(8), [false; 8]);
}

#[test]
fn pages_that_the_guest_has_not_are_refused() {
    let mut bench = bench(ALL);
    let list: Vec<u8> = [u32::MAX, u32::MAX - 1, 4096].into_iter().flat_map(u32::to_le_bytes).collect();
    bench.send(INFLATE, &[Part::Read(&list), Part::Read(&[1, 2, 3])]);
    assert_eq!((bench.counter("inflated_bytes"), bench.counter("refused_pages")), (0, 3));
}

#[test]
fn a_list_that_is_too_long_breaks_the_ring() {
    let mut bench = bench(ALL);
    bench.drivers[INFLATE].offer(&[Part::Read(&vec![0; MAX_LIST_BYTES as usize + 1])]);
    notify(&mut bench.balloon, INFLATE, &mut bench.drivers, &bench.memory).unwrap_err();
}

#[test]
fn the_driver_writes_its_own_fields_only() {
    let mut bench = bench(ALL);
    let read = |balloon: &Balloon, offset| {
        let mut bytes = [0xff; 4];
        balloon.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    for offset in [0, 4, 8, 12, 16, u64::MAX] {
        bench.balloon.write_config(offset, &7u32.to_le_bytes());
        bench.balloon.write_config(offset, &[9; 8]);
    }
    assert_eq!([0, 4, 8, 12, 16].map(|offset| read(&bench.balloon, offset)), [0, 7, 0, 7, 0]);
    bench.balloon.reset();
    assert_eq!([4, 12].map(|offset| read(&bench.balloon, offset)), [0, 0]);
}

proptest! {
    /// Of any part of memory its whole pages are given back, and not a byte beside it is touched.
    #[test]
    fn what_is_released_lies_in_the_part_that_was_named(offset in 0..4 * PAGE, len in 0..4 * PAGE) {
        let memory = memory();
        memory.write_slice(&vec![0xaa; 8 * PAGE], GuestAddress(FREE)).unwrap();
        let slice = memory.get_slice(GuestAddress(FREE + offset as u64), len).unwrap();
        let first = offset.next_multiple_of(PAGE);
        let whole = (offset + len).saturating_sub(first) / PAGE * PAGE;
        prop_assert_eq!(release(&slice), whole as u64);
        let mut bytes = vec![0; 8 * PAGE];
        memory.read_slice(&mut bytes, GuestAddress(FREE)).unwrap();
        let given_back = first..first + whole;
        prop_assert!(bytes.iter().enumerate().all(|(at, byte)| (*byte == 0) == given_back.contains(&at)));
    }
}
