use proptest::collection::vec;
use proptest::prelude::*;
use rings::*;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::*;

/// Small hand-made rings, so that tests can break any rule.
mod rings {
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    use crate::virtio::GuestMemory;

    pub const SIZE: u16 = 8;
    pub const TABLE: u64 = 0x1000;
    pub const AVAIL: u64 = 0x2000;
    pub const USED: u64 = 0x3000;
    pub const DATA: u64 = 0x8000;

    pub struct Ring {
        pub memory: GuestMemory,
        pub queue: Queue,
    }

    impl Ring {
        pub fn new() -> Self {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let mut queue = Queue::new(SIZE).unwrap();
            queue.set_desc_table_address(Some(TABLE as u32), Some(0));
            queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
            queue.set_used_ring_address(Some(USED as u32), Some(0));
            queue.set_ready(true);
            Self { memory, queue }
        }

        pub fn describe(&self, table: u64, index: u16, address: u64, len: u32, flags: u32, next: u16) {
            let at = table + u64::from(index) * 16;
            self.memory.write_obj(address, GuestAddress(at)).unwrap();
            self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags as u16, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        }

        pub fn offer(&self, heads: &[u16]) {
            for (slot, head) in heads.iter().enumerate() {
                self.memory.write_obj(*head, GuestAddress(AVAIL + 4 + 2 * slot as u64)).unwrap();
            }
            self.set_index(heads.len() as u16);
        }

        pub fn set_index(&self, index: u16) {
            self.memory.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
        }

        pub fn used_index(&self) -> u16 {
            self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
        }
    }
}

const LIMITS: Limits = Limits { queue: 3, max_bytes: 0x1000, max_buffers: 8, indirect: Indirect::Allowed };

fn reason(ring: &mut Ring, limits: Limits) -> String {
    next_chain(&mut ring.queue, &ring.memory, &limits).unwrap_err().to_string()
}

#[test]
fn a_chain_is_split_into_what_is_read_and_what_is_written() {
    let mut ring = Ring::new();
    ring.memory.write_slice(b"hello world", GuestAddress(DATA)).unwrap();
    ring.describe(TABLE, 2, DATA, 5, VRING_DESC_F_NEXT, 4);
    ring.describe(TABLE, 4, DATA + 5, 6, VRING_DESC_F_NEXT, 1);
    ring.describe(TABLE, 1, DATA + 0x100, 16, VRING_DESC_F_WRITE, 0);
    ring.offer(&[2]);
    let mut chain = next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable.len(), chain.writable.len()), (2, 11, 16));
    let mut text = [0; 11];
    chain.readable.read(&mut text).unwrap();
    assert_eq!(&text, b"hello world");
    assert!(chain.readable.is_empty());
    chain.writable.write(b"answer").unwrap();
    assert_eq!(chain.writable.len(), 10);
    assert!(next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().is_none());
}

#[test]
fn an_index_that_runs_ahead_breaks_the_ring() {
    let mut ring = Ring::new();
    ring.set_index(SIZE + 1);
    assert_eq!(reason(&mut ring, LIMITS), "queue 3: 9 chains offered in a ring of 8");
    ring.queue.set_next_avail(5);
    ring.set_index(4);
    assert!(reason(&mut ring, LIMITS).contains("65535 chains"));
}

#[test]
fn the_index_may_wrap_round() {
    let mut ring = Ring::new();
    ring.queue.set_next_avail(u16::MAX);
    ring.set_index(1);
    ring.describe(TABLE, 0, DATA, 4, 0, 0);
    for _ in 0..2 {
        assert!(next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().is_some());
    }
    assert!(next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().is_none());
}

#[test]
fn a_head_or_successor_outside_the_table_breaks_the_ring() {
    let mut ring = Ring::new();
    ring.offer(&[SIZE]);
    assert!(reason(&mut ring, LIMITS).contains("descriptor 8 is not in the table of 8"));
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 4, VRING_DESC_F_NEXT, 9);
    ring.offer(&[0]);
    assert!(reason(&mut ring, LIMITS).contains("descriptor 9"));
}

#[test]
fn a_loop_breaks_the_ring() {
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 4, VRING_DESC_F_NEXT, 1);
    ring.describe(TABLE, 1, DATA, 4, VRING_DESC_F_NEXT, 0);
    ring.offer(&[0]);
    assert!(reason(&mut ring, LIMITS).contains("more than 8 buffers"));
}

#[test]
fn more_bytes_than_the_limit_break_the_ring() {
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 0x800, VRING_DESC_F_NEXT, 1);
    ring.describe(TABLE, 1, DATA, 0x801, VRING_DESC_F_WRITE, 0);
    ring.offer(&[0]);
    assert!(reason(&mut ring, LIMITS).contains("more than 4096 bytes"));
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, u32::MAX, 0, 0);
    ring.offer(&[0]);
    assert!(reason(&mut ring, LIMITS).contains("more than 4096 bytes"));
}

#[test]
fn a_buffer_outside_memory_breaks_the_ring() {
    for address in [0xffff, 0x10000, u64::MAX] {
        let mut ring = Ring::new();
        ring.describe(TABLE, 0, address, 2, 0, 0);
        ring.offer(&[0]);
        assert!(reason(&mut ring, LIMITS).contains("is not in memory"), "{address:#x}");
    }
}

#[test]
fn reading_after_writing_breaks_the_ring() {
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 4, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
    ring.describe(TABLE, 1, DATA, 4, 0, 0);
    ring.offer(&[0]);
    assert!(reason(&mut ring, LIMITS).contains("after one to be written"));
}

#[test]
fn an_indirect_table_is_followed_once() {
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 32, VRING_DESC_F_INDIRECT, 0);
    ring.describe(DATA, 0, DATA + 0x100, 7, VRING_DESC_F_NEXT, 1);
    ring.describe(DATA, 1, DATA + 0x200, 9, VRING_DESC_F_WRITE, 0);
    ring.offer(&[0]);
    let chain = next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().unwrap();
    assert_eq!((chain.readable.len(), chain.writable.len()), (7, 9));
}

#[test]
fn bad_indirect_tables_break_the_ring() {
    let cases = [(VRING_DESC_F_INDIRECT, 24), (VRING_DESC_F_INDIRECT, 0), (VRING_DESC_F_INDIRECT, 16 * 9)];
    for (flags, len) in cases {
        let mut ring = Ring::new();
        ring.describe(TABLE, 0, DATA, len, flags, 0);
        ring.offer(&[0]);
        assert!(reason(&mut ring, LIMITS).contains("indirect table"), "{len}");
    }
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 16, VRING_DESC_F_INDIRECT, 0);
    ring.describe(DATA, 0, DATA, 16, VRING_DESC_F_INDIRECT, 0);
    ring.offer(&[0]);
    assert!(reason(&mut ring, LIMITS).contains("inside a chain"));
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 16, VRING_DESC_F_INDIRECT, 0);
    ring.offer(&[0]);
    let refused = Limits { indirect: Indirect::Refused, ..LIMITS };
    assert!(reason(&mut ring, refused).contains("not negotiated"));
}

#[test]
fn serving_completes_all_and_signals_once() {
    let mut ring = Ring::new();
    for index in 0..3 {
        ring.describe(TABLE, index, DATA, 4, VRING_DESC_F_WRITE, 0);
    }
    ring.offer(&[0, 1, 2]);
    let signals = serve(&mut ring.queue, &ring.memory, &LIMITS, |_| Ok(Served::Done(4))).unwrap();
    assert!(signals.has(3) && ring.used_index() == 3);
    let signals = serve(&mut ring.queue, &ring.memory, &LIMITS, |_| Ok(Served::Done(4))).unwrap();
    assert!(signals.is_empty());
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut ring = Ring::new();
    ring.memory.write_obj(VRING_AVAIL_F_NO_INTERRUPT as u16, GuestAddress(AVAIL)).unwrap();
    ring.describe(TABLE, 0, DATA, 4, 0, 0);
    ring.offer(&[0]);
    let signals = serve(&mut ring.queue, &ring.memory, &LIMITS, |_| Ok(Served::Done(0))).unwrap();
    assert!(signals.is_empty() && ring.used_index() == 1);
}

#[test]
fn what_is_put_off_stays_available() {
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 4, 0, 0);
    ring.offer(&[0]);
    let signals = serve(&mut ring.queue, &ring.memory, &LIMITS, |_| Ok(Served::Later)).unwrap();
    assert!(signals.is_empty() && ring.used_index() == 0);
    assert!(next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().is_some());
}

#[test]
fn buffers_split_anywhere() {
    let mut ring = Ring::new();
    ring.describe(TABLE, 0, DATA, 10, VRING_DESC_F_NEXT, 1);
    ring.describe(TABLE, 1, DATA + 10, 10, 0, 0);
    for at in 0..=20 {
        ring.offer(&[0]);
        ring.queue.set_next_avail(0);
        let mut chain = next_chain(&mut ring.queue, &ring.memory, &LIMITS).unwrap().unwrap();
        let last = chain.readable.split_last(at).unwrap();
        assert_eq!((chain.readable.len(), last.len()), (20 - at, at));
        assert!(chain.readable.split_first(21 - at).is_err());
    }
}

/// Whatever a ring holds, taking from it ends, and ends in a chain within the limits or in an error.
#[test]
fn random_rings_are_survived() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut ring = Ring::new();
        for index in 0..SIZE {
            let address = DATA + random() % 0x9000;
            let len = (random() % 0x1200) as u32;
            ring.describe(TABLE, index, address, len, (random() % 8) as u32, (random() % 9) as u16);
            ring.describe(DATA, index, address, len, (random() % 4) as u32, (random() % 9) as u16);
        }
        ring.offer(&[(random() % 9) as u16]);
        if let Ok(Some(chain)) = next_chain(&mut ring.queue, &ring.memory, &LIMITS) {
            assert!(chain.readable.len() + chain.writable.len() <= 0x1000);
        }
    }
}

/// Numbers that are often just inside, just outside, or at the very end.
fn tricky(inside: std::ops::Range<u64>) -> impl Strategy<Value = u64> {
    let (start, end) = (inside.start, inside.end);
    prop_oneof![
        inside,
        Just(start),
        Just(end - 1),
        Just(end),
        Just(u64::MAX),
        Just(u64::MAX - 15),
        any::<u64>()
    ]
}

fn descriptors() -> impl Strategy<Value = Vec<(u64, u32, u32, u16)>> {
    let len = prop_oneof![0u32..0x800, Just(0x1000), Just(u32::MAX), any::<u32>()];
    vec((tricky(0..0x10000), len, 0u32..8, prop_oneof![0u16..10, any::<u16>()]), 8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Whatever a ring says, what is taken from it is memory of the guest within the limits, or an error.
    #[test]
    fn a_chain_of_any_ring_is_within_its_limits(
        table in descriptors(),
        indirect in descriptors(),
        head in prop_oneof![0u16..10, any::<u16>()],
        index in prop_oneof![0u16..10, any::<u16>()],
        moved in proptest::option::of((tricky(0..0x10000), tricky(0..0x10000))),
        refused in any::<bool>(),
    ) {
        let mut ring = Ring::new();
        for (at, entries) in [(TABLE, &table), (DATA, &indirect)] {
            for (slot, &(address, len, flags, next)) in (0..).zip(entries) {
                // An indirect table lies where one can be.
                let address = if at == TABLE && flags & 4 != 0 && next < 8 { DATA } else { address };
                ring.describe(at, slot, address, len, flags, next);
            }
        }
        ring.offer(&[head]);
        ring.set_index(index);
        if let Some((descriptors, available)) = moved {
            ring.queue.set_desc_table_address(Some(descriptors as u32), Some((descriptors >> 32) as u32));
            ring.queue.set_avail_ring_address(Some(available as u32), Some((available >> 32) as u32));
        }
        let indirect = if refused { Indirect::Refused } else { Indirect::Allowed };
        let limits = Limits { indirect, ..LIMITS };
        if let Ok(Some(chain)) = next_chain(&mut ring.queue, &ring.memory, &limits) {
            let start = ring.memory.get_host_address(GuestAddress(0)).unwrap() as usize;
            let parts: Vec<_> = chain.readable.slices().chain(chain.writable.slices()).collect();
            prop_assert!(parts.len() <= limits.max_buffers);
            let bytes: usize = parts.iter().map(|part| part.len()).sum();
            prop_assert!(bytes as u64 <= limits.max_bytes);
            prop_assert_eq!(bytes, chain.readable.len() + chain.writable.len());
            for part in parts {
                let at = part.ptr_guard().as_ptr() as usize;
                prop_assert!(at >= start && at + part.len() <= start + 0x10000);
            }
        }
    }
}
