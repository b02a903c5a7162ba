use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::devices::testing::{Driver, Part, memory, notify};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A disk of 64 sectors, each filled with its number.
struct Bench {
    directory: TempDir,
    blk: Blk,
    memory: GuestMemory,
    drivers: [Driver; 1],
}

fn pattern() -> Vec<u8> {
    (0..64u8).flat_map(|sector| [sector; 512]).collect()
}

fn image(directory: &TempDir, content: &[u8]) -> PathBuf {
    let path = directory.path().join("disk.img");
    fs::write(&path, content).unwrap();
    path
}

fn bench(read_only: bool) -> Bench {
    let directory = TempDir::new().unwrap();
    let path = image(&directory, &pattern());
    let mut blk = Blk::open(0, &DiskConfig { path, read_only }).unwrap();
    blk.activate(blk.features());
    let memory = memory();
    let drivers = [Driver::new(&memory, 0, QUEUE_SIZE)];
    Bench { directory, blk, memory, drivers }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Bench {
    /// Sends a request; returns the status byte and what the device wrote before it.
    fn send(&mut self, parts: &[Part<'_>]) -> (u8, Vec<u8>) {
        let driver = &mut self.drivers[0];
        let offered = driver.offer(parts);
        let signals = notify(&mut self.blk, 0, &mut self.drivers, &self.memory).unwrap();
        assert!(signals.has(0));
        let driver = &mut self.drivers[0];
        let used = driver.used();
        let mut written: Vec<u8> = Vec::new();
        for (part, buffer) in parts.iter().zip(&offered.buffers) {
            if !matches!(part, Part::Read(_)) {
                written.extend(driver.read(*buffer));
            }
        }
        assert_eq!(used, [(offered.head, written.len() as u32)]);
        (written.pop().unwrap(), written)
    }

    fn breaks(&mut self, parts: &[Part<'_>]) -> String {
        self.drivers[0].offer(parts);
        let error = notify(&mut self.blk, 0, &mut self.drivers, &self.memory).unwrap_err();
        assert!(self.drivers[0].used().is_empty());
        error.to_string()
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.directory.path().join("disk.img")).unwrap()
    }
}

#[test]
fn sectors_are_read_into_split_buffers() {
    let mut bench = bench(true);
    let (status, data) = bench.send(&[
        Part::Read(&header(VIRTIO_BLK_T_IN, 3)),
        Part::Write(100),
        Part::Write(924),
        Part::Write(1),
    ]);
    assert_eq!(status, OK);
    assert_eq!(data, [[3; 512], [4; 512]].concat());
    assert_eq!(bench.blk.statistics()["read_bytes"], 1024);
}

#[test]
fn the_frame_of_a_request_may_be_cut_anywhere() {
    let mut bench = bench(false);
    let header = header(VIRTIO_BLK_T_OUT, 1);
    let joined = [&header[..], &[7; 512]].concat();
    let (first, rest) = joined.split_at(5);
    assert_eq!(bench.send(&[Part::Read(first), Part::Read(rest), Part::Write(1)]).0, OK);
    assert_eq!(bench.content()[512..1024], [7; 512]);
    // Data and status in one buffer.
    let (status, data) = bench.send(&[Part::Read(&self::header(VIRTIO_BLK_T_IN, 1)), Part::Write(513)]);
    assert_eq!((status, data), (OK, vec![7; 512]));
}

#[test]
fn sectors_are_written() {
    let mut bench = bench(false);
    let data = [9; 1024];
    assert_eq!(
        bench.send(&[Part::Read(&header(VIRTIO_BLK_T_OUT, 62)), Part::Read(&data), Part::Write(1)]).0,
        OK
    );
    let mut expected = pattern();
    expected[62 * 512..].fill(9);
    assert!(bench.content() == expected);
    assert_eq!(bench.send(&[Part::Read(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Write(1)]).0, OK);
    assert_eq!(bench.blk.statistics()["flushes"], 1);
}

#[test]
fn nothing_past_the_end_is_read_or_written() {
    for sector in [63, 64, 65, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX - 1, u64::MAX] {
        let mut bench = bench(false);
        let read = [Part::Read(&header(VIRTIO_BLK_T_IN, sector)), Part::Write(1024), Part::Write(1)];
        let (status, data) = bench.send(&read);
        assert_eq!((status, data), (IO_ERROR, vec![0; 1024]), "{sector}");
        let write = [Part::Read(&header(VIRTIO_BLK_T_OUT, sector)), Part::Read(&[1; 1024]), Part::Write(1)];
        assert_eq!(bench.send(&write).0, IO_ERROR, "{sector}");
        assert!(bench.content() == pattern(), "{sector}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut bench = bench(true);
    assert_ne!(bench.blk.features() & (1 << VIRTIO_BLK_F_RO), 0);
    assert_eq!(bench.blk.features() & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    let data = [1; 512];
    assert_eq!(
        bench.send(&[Part::Read(&header(VIRTIO_BLK_T_OUT, 0)), Part::Read(&data), Part::Write(1)]).0,
        IO_ERROR
    );
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let parts = [Part::Read(&header(kind, 0)), Part::Read(&segment(0, 1, 0)), Part::Write(1)];
        assert_eq!(bench.send(&parts).0, IO_ERROR);
    }
    assert_eq!(bench.send(&[Part::Read(&header(VIRTIO_BLK_T_FLUSH, 0)), Part::Write(1)]).0, OK);
    assert!(bench.content() == pattern());
}

#[test]
fn malformed_requests_are_answered_with_an_error() {
    let mut bench = bench(false);
    let read = header(VIRTIO_BLK_T_IN, 0);
    let write = header(VIRTIO_BLK_T_OUT, 0);
    let unknown = header(77, 0);
    let cases = [
        ("a header cut short", vec![Part::Read(&read[..15]), Part::Write(1)], IO_ERROR),
        ("no header", vec![Part::Write(513)], IO_ERROR),
        ("half a sector read", vec![Part::Read(&read), Part::Write(256), Part::Write(1)], IO_ERROR),
        ("half a sector written", vec![Part::Read(&write), Part::Read(&[1; 256]), Part::Write(1)], IO_ERROR),
        (
            "a read with data to read",
            vec![Part::Read(&read), Part::Read(&[1; 512]), Part::Write(513)],
            IO_ERROR,
        ),
        (
            "a write into the guest",
            vec![Part::Read(&write), Part::Read(&[1; 512]), Part::Write(513)],
            IO_ERROR,
        ),
        ("an unknown type", vec![Part::Read(&unknown), Part::Write(1)], UNSUPPORTED),
    ];
    for (what, parts, expected) in &cases {
        assert_eq!(bench.send(parts).0, *expected, "{what}");
    }
    assert!(bench.content() == pattern());
    assert_eq!(bench.blk.statistics()["errors"], cases.len() as u64);
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_ring() {
    let mut bench = bench(false);
    assert!(bench.breaks(&[Part::Read(&header(VIRTIO_BLK_T_IN, 0))]).contains("without room for its status"));
    assert!(bench.breaks(&[Part::Read(&header(VIRTIO_BLK_T_OUT, 0)), Part::Write(0)]).contains("status"));
}

#[test]
fn a_chain_that_is_too_long_or_loops_breaks_the_ring() {
    let mut bench = bench(false);
    let driver = &mut bench.drivers[0];
    driver.describe(0, 0x20000, 512, 1, 0);
    driver.offer_head(0);
    let error = notify(&mut bench.blk, 0, &mut bench.drivers, &bench.memory).unwrap_err();
    assert!(error.to_string().contains("more than 256 buffers"), "{error}");
    let mut bench = self::bench(false);
    let header = header(VIRTIO_BLK_T_IN, 0);
    assert!(bench.breaks(&[Part::Read(&header), Part::WriteAt(0, u32::MAX)]).contains("bytes"));
    let mut bench = self::bench(false);
    assert!(bench.breaks(&[Part::Read(&header), Part::WriteAt(1 << 40, 512)]).contains("not in memory"));
}

/// What a guest aims at its own rings lands there and nowhere else.
#[test]
fn a_read_over_its_own_ring_is_survived() {
    let mut bench = bench(false);
    let driver = &mut bench.drivers[0];
    driver.offer(&[Part::Read(&header(VIRTIO_BLK_T_IN, 1)), Part::WriteAt(0, 4096), Part::Write(1)]);
    let _ = notify(&mut bench.blk, 0, &mut bench.drivers, &bench.memory);
    assert!(bench.content() == pattern());
}

#[test]
fn the_identifier_is_told() {
    let mut bench = bench(true);
    let (status, id) =
        bench.send(&[Part::Read(&header(VIRTIO_BLK_T_GET_ID, 0)), Part::Write(20), Part::Write(1)]);
    assert_eq!((status, &id[..]), (OK, &b"sandbox-blk0\0\0\0\0\0\0\0\0"[..]));
    let short = [Part::Read(&header(VIRTIO_BLK_T_GET_ID, 0)), Part::Write(19), Part::Write(1)];
    assert_eq!(bench.send(&short).0, IO_ERROR);
}

#[test]
fn segments_become_zeroes_and_space() {
    let mut bench = bench(false);
    let zero = |bench: &mut Bench, kind, data: &[u8]| {
        bench.send(&[Part::Read(&header(kind, 0)), Part::Read(data), Part::Write(1)]).0
    };
    for (kind, flags, first) in
        [(VIRTIO_BLK_T_DISCARD, 0, 8), (VIRTIO_BLK_T_WRITE_ZEROES, 0, 24), (VIRTIO_BLK_T_WRITE_ZEROES, 1, 40)]
    {
        assert_eq!(zero(&mut bench, kind, &segment(first, 8, flags)), OK);
        let mut expected = pattern();
        expected[first as usize * 512..][..8 * 512].fill(0);
        let content = bench.content();
        assert!(content[first as usize * 512..][..8 * 512].iter().all(|byte| *byte == 0), "{kind} {flags}");
        assert_eq!(content[..8 * 512], pattern()[..8 * 512]);
        assert_eq!(content[48 * 512..], expected[48 * 512..]);
    }
    let blocks = fs::metadata(bench.directory.path().join("disk.img")).unwrap().blocks();
    assert!(blocks <= 64 - 8, "{blocks}");
}

#[test]
fn bad_segments_are_refused() {
    let mut bench = bench(false);
    let two = [segment(0, 1, 0), segment(1, 1, 0)].concat();
    let cases = [
        (VIRTIO_BLK_T_DISCARD, segment(0, 1, 1), UNSUPPORTED),
        (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1, 2), UNSUPPORTED),
        (VIRTIO_BLK_T_DISCARD, segment(0, 0, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, segment(64, 1, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, segment(0, 65, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, segment(u64::MAX, u32::MAX, 0), IO_ERROR),
        (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, u32::MAX, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, two, IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, vec![0; 15], IO_ERROR),
    ];
    for (kind, data, expected) in cases {
        let status = bench.send(&[Part::Read(&header(kind, 0)), Part::Read(&data), Part::Write(1)]).0;
        assert_eq!(status, expected, "{kind} {data:?}");
    }
    assert!(bench.content() == pattern());
}

#[test]
fn an_image_that_was_cut_short_is_an_error_not_a_fault() {
    let mut bench = bench(false);
    let file = fs::File::options().write(true).open(bench.directory.path().join("disk.img")).unwrap();
    file.set_len(512).unwrap();
    let parts = [Part::Read(&header(VIRTIO_BLK_T_IN, 0)), Part::Write(1024), Part::Write(1)];
    assert_eq!(bench.send(&parts).0, IO_ERROR);
}

#[test]
fn the_configuration_space_says_what_is_there() {
    let bench = bench(false);
    let field = |offset| {
        let mut bytes = [0; 4];
        bench.blk.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!((field(0), field(4)), (64, 0));
    assert_eq!((field(8), field(12)), (SIZE_MAX, SEG_MAX));
    assert_eq!((field(36), field(40), field(48), field(52)), (1 << 21, 1, 1 << 15, 1));
    assert_eq!(field(60), 0);
}

#[test]
fn an_image_of_no_whole_number_of_sectors_is_refused() {
    let directory = TempDir::new().unwrap();
    for content in [&[][..], &[1; 511], &[1; 513]] {
        let path = image(&directory, content);
        let error = Blk::open(0, &DiskConfig { path, read_only: true }).unwrap_err().to_string();
        assert!(error.contains(&format!("has {} bytes", content.len())), "{error}");
        assert!(error.contains("truncate -s %512"), "{error}");
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let directory = TempDir::new().unwrap();
    let open = |path: PathBuf| Blk::open(0, &DiskConfig { path, read_only: true }).unwrap_err();
    assert!(matches!(open(directory.path().to_owned()), ImageError::Kind(_)));
    assert!(matches!(open("/dev/null".into()), ImageError::Kind(_)));
    assert!(matches!(open(directory.path().join("none")), ImageError::Open { .. }));
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(matches!(open(fifo), ImageError::Kind(_)));
}

#[test]
fn a_disk_has_one_writer_or_only_readers() {
    let directory = TempDir::new().unwrap();
    let path = image(&directory, &pattern());
    let open = |read_only| Blk::open(0, &DiskConfig { path: path.clone(), read_only });
    let readers = [open(true).unwrap(), open(true).unwrap()];
    assert!(matches!(open(false), Err(ImageError::Busy { .. })));
    drop(readers);
    let writer = open(false).unwrap();
    assert!(matches!(open(true), Err(ImageError::Busy { .. })));
    drop(writer);
    open(true).unwrap();
}

#[test]
fn a_request_of_any_sector_and_length_stays_inside_the_disk() {
    let directory = TempDir::new().unwrap();
    let path = image(&directory, &pattern());
    let disk = Image::open(&DiskConfig { path, read_only: true }).unwrap();
    let sectors = prop_oneof![0u64..70, any::<u64>()];
    let bytes = prop_oneof![(0u64..70).prop_map(|count| count * 512), 0u64..40_000, any::<u64>()];
    proptest!(|(sector in sectors, bytes in bytes)| {
        let fits = bytes % 512 == 0 && u128::from(sector) * 512 + u128::from(bytes) <= 64 * 512;
        prop_assert_eq!(disk.span(sector, bytes).is_some(), fits);
    });
}
