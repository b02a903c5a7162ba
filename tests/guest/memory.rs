//! Memory that is really used.

use crate::{Outcome, number};

const PAGE_BYTES: usize = 4096;

/// Takes that many MiB, touches every page, and prints `allocated`.
pub fn allocate(arguments: &[String]) -> Outcome {
    let taken = take(number(arguments, 0)?);
    println!("allocated {}", taken.len() >> 20);
    Ok(())
}

/// That many MiB with something in every page.
pub fn take(mib: usize) -> Vec<u8> {
    let mut memory = vec![0; mib << 20];
    for page in memory.chunks_mut(PAGE_BYTES) {
        page[0] = 1;
    }
    std::hint::black_box(memory)
}
