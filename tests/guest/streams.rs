//! Bulk output and input that can be checked.

use std::io::{self, Read, Write};

use sandbox_tests::pattern::{Checksum, fill};

use crate::{Outcome, number};

/// Writes a fixed pseudo-random sequence to standard output.
pub fn pattern(arguments: &[String]) -> Outcome {
    let mut left = number(arguments, 0)?;
    let mut state = 1;
    let mut out = io::stdout().lock();
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        fill(&mut buffer, &mut state);
        let now = left.min(buffer.len());
        out.write_all(&buffer[..now]).map_err(|e| format!("standard output: {e}"))?;
        left -= now;
    }
    Ok(())
}

/// Prints length and checksum of standard input.
pub fn checksum(_: &[String]) -> Outcome {
    let mut sum = Checksum::default();
    let mut buffer = vec![0; 64 << 10];
    let mut input = io::stdin().lock();
    loop {
        match input.read(&mut buffer).map_err(|e| format!("standard input: {e}"))? {
            0 => break,
            n => sum.add(&buffer[..n]),
        }
    }
    println!("{sum}");
    Ok(())
}
