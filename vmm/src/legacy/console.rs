//! The file that takes what the guest writes to its console.
//!
//! A guest can write without end, so the file has a largest size and a largest rate; what is above either is
//! dropped and counted, and the file says so at the place.

use std::fs::File;
use std::io::{self, Write};
use std::time::Instant;

use crate::output_limit::{Bounds, Counts, OutputLimit, Verdict};

/// A verbose boot has less than half of a second's share.
const BOUNDS: Bounds = Bounds { total: 16 << 20, per_second: 256 << 10 };
/// Bytes are gathered up to the end of a line or this many.
const BUFFER_BYTES: usize = 512;

/// A console file with limits.
#[derive(Debug)]
pub struct ConsoleFile {
    file: File,
    line: Vec<u8>,
    limit: OutputLimit,
}

impl ConsoleFile {
    /// Writes to a file from now on.
    pub fn new(file: File) -> Self {
        let limit = OutputLimit::new(BOUNDS, Instant::now());
        Self { file, line: Vec::with_capacity(BUFFER_BYTES), limit }
    }

    /// What has been written and dropped.
    pub fn counts(&self) -> Counts {
        self.limit.counts()
    }

    fn flush_line(&mut self) -> io::Result<()> {
        if self.line.is_empty() {
            return Ok(());
        }
        let line = std::mem::take(&mut self.line);
        let result = match self.limit.admit(line.len() as u64, Instant::now()) {
            Verdict::Write => self.file.write_all(&line),
            Verdict::WriteAfterGap(bytes) => {
                write!(self.file, "\n[{bytes} bytes of console output dropped]\n")
                    .and_then(|()| self.file.write_all(&line))
            }
            Verdict::Drop => Ok(()),
        };
        self.line = line;
        self.line.clear();
        result
    }
}

impl Write for ConsoleFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() == BUFFER_BYTES {
                self.flush_line()?;
            }
        }
        Ok(data.len())
    }

    /// The serial port flushes after each byte; lines are written when they end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ConsoleFile {
    fn drop(&mut self) {
        let _ = self.flush_line();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_when_they_end_and_the_rest_at_the_end() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let mut console = ConsoleFile::new(path.reopen().unwrap());
        console.write_all(b"one\ntw").unwrap();
        assert_eq!(std::fs::read(path.path()).unwrap(), b"one\n");
        drop(console);
        assert_eq!(std::fs::read(path.path()).unwrap(), b"one\ntw");
    }
}
