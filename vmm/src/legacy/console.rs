//! The file that takes what the guest writes to its console.
//!
//! A guest can write without end, so the file has a largest size and a largest rate; what is above either is
//! dropped and counted, and the file says so at the place.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// The most bytes of a console file.
const MAX_BYTES: u64 = 16 << 20;
/// The most bytes in a second: a verbose boot has a tenth of it.
const MAX_BYTES_PER_SECOND: u64 = 1 << 20;
/// Bytes are gathered up to the end of a line or this many.
const BUFFER_BYTES: usize = 512;

/// A console file with limits.
#[derive(Debug)]
pub struct ConsoleFile {
    file: File,
    line: Vec<u8>,
    limits: Limits,
}

/// What has been written and dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes in the file.
    pub written: u64,
    /// Bytes that were dropped.
    pub dropped: u64,
}

impl ConsoleFile {
    /// Writes to a file from now on.
    pub fn new(file: File) -> Self {
        Self { file, line: Vec::with_capacity(BUFFER_BYTES), limits: Limits::new(Instant::now()) }
    }

    /// What has been written and dropped.
    pub fn counts(&self) -> Counts {
        self.limits.counts
    }

    fn flush_line(&mut self) -> io::Result<()> {
        if self.line.is_empty() {
            return Ok(());
        }
        let line = std::mem::take(&mut self.line);
        let result = match self.limits.admit(line.len() as u64, Instant::now()) {
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

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write,
    WriteAfterGap(u64),
    Drop,
}

#[derive(Debug)]
struct Limits {
    counts: Counts,
    gap: u64,
    second: Instant,
    in_second: u64,
}

impl Limits {
    fn new(now: Instant) -> Self {
        Self { counts: Counts::default(), gap: 0, second: now, in_second: 0 }
    }

    fn admit(&mut self, bytes: u64, now: Instant) -> Verdict {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.in_second = 0;
        }
        if self.counts.written + bytes > MAX_BYTES || self.in_second + bytes > MAX_BYTES_PER_SECOND {
            self.counts.dropped += bytes;
            self.gap += bytes;
            return Verdict::Drop;
        }
        self.counts.written += bytes;
        self.in_second += bytes;
        match std::mem::take(&mut self.gap) {
            0 => Verdict::Write,
            gap => Verdict::WriteAfterGap(gap),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_its_limit_and_the_gap_is_told() {
        let start = Instant::now();
        let mut limits = Limits::new(start);
        assert_eq!(limits.admit(MAX_BYTES_PER_SECOND, start), Verdict::Write);
        assert_eq!(limits.admit(7, start), Verdict::Drop);
        assert_eq!(limits.admit(5, start + Duration::from_secs(1)), Verdict::WriteAfterGap(7));
        assert_eq!(limits.admit(5, start + Duration::from_secs(1)), Verdict::Write);
        assert_eq!(limits.counts, Counts { written: MAX_BYTES_PER_SECOND + 10, dropped: 7 });
    }

    #[test]
    fn the_file_has_its_limit() {
        let start = Instant::now();
        let mut limits = Limits::new(start);
        for second in 0..100 {
            limits.admit(MAX_BYTES_PER_SECOND, start + Duration::from_secs(second));
        }
        assert_eq!(limits.counts.written, MAX_BYTES);
        assert_eq!(limits.counts.dropped, 100 * MAX_BYTES_PER_SECOND - MAX_BYTES);
    }

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
