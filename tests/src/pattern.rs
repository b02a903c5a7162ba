//! A fixed pseudo-random sequence, and a checksum, that host and guest compute alike.

use std::io::{self, Read, Write};

/// Fills `buffer`, whose length is a multiple of 8, with the next part of the sequence (xorshift64).
pub fn fill(buffer: &mut [u8], state: &mut u64) {
    for word in buffer.chunks_exact_mut(8) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// Writes the first `bytes` bytes of the sequence.
pub fn write(to: &mut impl Write, bytes: usize) -> io::Result<()> {
    let (mut left, mut state) = (bytes, 1);
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        fill(&mut buffer, &mut state);
        let now = left.min(buffer.len());
        to.write_all(&buffer[..now])?;
        left -= now;
    }
    Ok(())
}

/// The checksum of all that can be read, as it is printed.
pub fn checksum(from: &mut impl Read) -> io::Result<String> {
    let mut sum = Checksum::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(sum.to_string()),
            n => sum.add(&buffer[..n]),
        }
    }
}

/// Length and checksum of a stream, whatever the sizes of its parts: FNV-1a over 8-byte words.
#[derive(Default)]
pub struct Checksum {
    length: u64,
    hash: u64,
    rest: Vec<u8>,
}

impl Checksum {
    /// Takes the next part.
    pub fn add(&mut self, part: &[u8]) {
        self.length += part.len() as u64;
        self.rest.extend_from_slice(part);
        let whole = self.rest.len() / 8 * 8;
        for word in self.rest[..whole].chunks_exact(8) {
            let value = word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            self.hash = (self.hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
        }
        self.rest.drain(..whole);
    }
}

impl Write for Checksum {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.add(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rest = self.rest.iter().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
        write!(f, "{} {:016x}", self.length, self.hash ^ rest)
    }
}

/// The checksum of the first `bytes` bytes of the sequence, as it is printed.
pub fn checksum_of(bytes: usize) -> String {
    let mut sum = Checksum::default();
    write(&mut sum, bytes).expect("a sum has room for all");
    sum.to_string()
}

/// The first `bytes` bytes of the sequence.
pub fn sequence(bytes: usize) -> Vec<u8> {
    let mut all = vec![0; bytes.next_multiple_of(8)];
    fill(&mut all, &mut 1);
    all.truncate(bytes);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_does_not_depend_on_how_the_stream_was_cut() {
        let all = sequence(1001);
        let mut cut = Checksum::default();
        all.chunks(7).for_each(|part| cut.add(part));
        assert_eq!(cut.to_string(), checksum_of(1001));
        assert_ne!(checksum_of(1000), checksum_of(1001));
    }
}
