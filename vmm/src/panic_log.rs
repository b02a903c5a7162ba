//! The last words of a guest's kernel, read from the guest's memory after it is gone.
//!
//! A machine needs no console for this. The kernel's `ramoops` driver is given a region of memory that it is
//! kept out of otherwise, and copies the end of its log there when it panics; the machine reads the region
//! after the reset that follows. (Format of Linux 6.12, `fs/pstore/ram.c` and `ram_core.c`.)
//!
//! ```text
//!  region   RECORDS records of RECORD_BYTES
//!  record   signature "DBGC" (4)  start (4)  size (4)  ring buffer
//!  content  ====1764041602.123456-D        time, and D for text or C for compressed
//!           Panic#1 Part1                  the reason, and the number of the dump
//!           <0>[    1.234567] Kernel panic - not syncing: ...
//! ```
//!
//! `start` is where the oldest byte of the ring buffer is once it has wrapped round, and where the next would
//! go; `size` is how many bytes are valid. All of it is the guest's to write, whenever it likes: a guest can
//! put a panic there that did not happen. It is text for people and decides nothing but the name of an exit.

use sandbox_vmm_api::PANIC_LOG_BYTES;

/// Records in the region. A panic fills one.
const RECORDS: u64 = 4;

/// The bytes of a record. What is returned of it fits: 64 lines of 256 bytes.
const RECORD_BYTES: u64 = PANIC_LOG_BYTES / RECORDS;

/// The bytes before the ring buffer.
const HEADER_BYTES: usize = 12;

/// `DBGC`, little endian.
const SIGNATURE: u32 = 0x4347_4244;

/// The most lines that are returned, the last ones.
const MAX_LINES: usize = 64;

/// The most bytes of a line that are returned, the first ones.
const MAX_LINE_BYTES: usize = 256;

/// What the kernel calls a reason of `KMSG_DUMP_PANIC`.
const REASON: &str = "Panic#";

/// The words of the kernel's command line that make it leave its log in the region at this address.
///
/// `max_reason=1` leaves out what is not a panic, `mem_type=2` is ordinary cached memory, and compressed
/// records could not be read here. The sizes that are 0 would otherwise take a part of the region each.
pub fn words(address: u64) -> String {
    format!(
        "ramoops.mem_address={address:#x} ramoops.mem_size={PANIC_LOG_BYTES:#x} \
         ramoops.record_size={RECORD_BYTES:#x} ramoops.console_size=0 ramoops.ftrace_size=0 \
         ramoops.pmsg_size=0 ramoops.mem_type=2 ramoops.max_reason=1 pstore.compress=none"
    )
}

/// The end of the kernel's log, oldest line first, if the region holds that of a panic.
///
/// At most 64 lines of at most 256 printable ASCII characters each, without the kernel's levels.
pub fn parse(region: &[u8]) -> Option<Vec<String>> {
    let record_bytes = usize::try_from(RECORD_BYTES).ok()?;
    let records = region.chunks_exact(record_bytes).take(RECORDS as usize);
    let panics = records.filter_map(|record| Panic::parse(&ring_content(record)?));
    panics.max_by_key(|panic| panic.number).map(|panic| panic.lines)
}

/// The bytes of a record's ring buffer, oldest first.
fn ring_content(record: &[u8]) -> Option<Vec<u8>> {
    let (header, ring) = record.split_at_checked(HEADER_BYTES)?;
    let word = |index: usize| {
        let bytes = header.get(4 * index..4 * index + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let start = usize::try_from(word(1)?).ok()?;
    let size = usize::try_from(word(2)?).ok()?;
    if word(0)? != SIGNATURE || start > size {
        return None;
    }
    let (newer, older) = ring.get(..size)?.split_at_checked(start)?;
    Some([older, newer].concat())
}

/// A panic's record.
struct Panic {
    number: u64,
    lines: Vec<String>,
}

impl Panic {
    fn parse(content: &[u8]) -> Option<Self> {
        let mut lines = content.split(|&byte| byte == b'\n');
        let time = lines.next()?;
        if !time.starts_with(b"====") || !time.ends_with(b"-D") {
            return None;
        }
        let reason = printable(lines.next()?);
        let (number, part) = reason.strip_prefix(REASON)?.split_once(' ')?;
        if part != "Part1" {
            return None;
        }
        let number = number.parse().ok()?;
        let text: Vec<&[u8]> = lines.map(without_level).collect();
        let end = text.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
        let kept = text.get(end.saturating_sub(MAX_LINES)..end)?;
        Some(Self { number, lines: kept.iter().map(|line| printable(line)).collect() })
    }
}

/// A line without the `<level>` in front of it.
fn without_level(line: &[u8]) -> &[u8] {
    let level = |line| {
        let (level, rest) = <[u8]>::split_at_checked(line, line.iter().position(|&byte| byte == b'>')?)?;
        let digits = level.strip_prefix(b"<")?;
        let is_level = !digits.is_empty() && digits.len() <= 3 && digits.iter().all(u8::is_ascii_digit);
        if is_level { rest.strip_prefix(b">") } else { None }
    };
    level(line).unwrap_or(line)
}

/// The first bytes of a line, with `?` for what a terminal might take for more than text.
fn printable(line: &[u8]) -> String {
    let shown = |&byte: &u8| match byte {
        b' '..=b'~' => char::from(byte),
        b'\t' => ' ',
        _ => '?',
    };
    line.iter().take(MAX_LINE_BYTES).map(shown).collect()
}

#[cfg(test)]
#[path = "panic_log_tests.rs"]
mod tests;
