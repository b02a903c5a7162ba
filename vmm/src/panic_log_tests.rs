use super::*;

/// The region with this content in its first record.
fn region(content: &[u8]) -> Vec<u8> {
    let mut region = vec![0; PANIC_LOG_BYTES as usize];
    set_record(&mut region, 0, SIGNATURE, content.len(), content.len(), content);
    region
}

fn set_record(region: &mut [u8], record: usize, signature: u32, start: usize, size: usize, content: &[u8]) {
    let record = &mut region[record * RECORD_BYTES as usize..][..RECORD_BYTES as usize];
    let header = [signature, start as u32, size as u32].map(u32::to_le_bytes);
    record[..HEADER_BYTES].copy_from_slice(header.as_flattened());
    record[HEADER_BYTES..][..content.len()].copy_from_slice(content);
}

fn panic_text(number: u32, lines: &str) -> Vec<u8> {
    format!("====1795580644.640730-D\nPanic#{number} Part1\n{lines}").into_bytes()
}

/// What Linux 6.12 left when its init ended.
#[test]
fn the_log_of_a_panic_is_read() {
    let log = "<5>Linux version 6.12.117\n\
        <0>Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300\n\
        <4>CPU: 0 UID: 0 PID: 1 Comm: init Not tainted 6.12.117-sandbox #1\n\
        <4>[    0.123456] Call Trace:\n\
        <4> </TASK>\n\
        <0>Kernel Offset: disabled\n";
    assert_eq!(
        parse(&region(&panic_text(1, log))).unwrap(),
        [
            "Linux version 6.12.117",
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300",
            "CPU: 0 UID: 0 PID: 1 Comm: init Not tainted 6.12.117-sandbox #1",
            "[    0.123456] Call Trace:",
            " </TASK>",
            "Kernel Offset: disabled",
        ]
    );
}

#[test]
fn the_last_lines_are_kept_and_no_blank_ones_after_them() {
    let log: String = (0..300).map(|number| format!("<6>line {number}\n")).collect();
    let lines = parse(&region(&panic_text(1, &(log + "\n\n")))).unwrap();
    assert_eq!(lines.len(), MAX_LINES);
    assert_eq!((lines[0].as_str(), lines[MAX_LINES - 1].as_str()), ("line 236", "line 299"));
}

#[test]
fn what_a_terminal_would_obey_is_not_passed_on() {
    let mut log = panic_text(1, "<6>a\tb\x1b[31m\r");
    log.extend(b"\xff\x00\n");
    log.extend([b'x'; 1000]);
    assert_eq!(parse(&region(&log)).unwrap(), ["a b?[31m???", &"x".repeat(MAX_LINE_BYTES)]);
}

#[test]
fn only_a_level_is_taken_off() {
    let log = "<6><6>a\n<b>\n<1234>\n<>\n< 1>\n<7\n7>\n";
    let lines = parse(&region(&panic_text(1, log))).unwrap();
    assert_eq!(lines, ["<6>a", "<b>", "<1234>", "<>", "< 1>", "<7", "7>"]);
}

#[test]
fn the_newest_panic_counts() {
    let mut region = region(&panic_text(2, "first\n"));
    let records = [(1, panic_text(10, "second\n")), (2, panic_text(9, "third\n")), (3, b"nothing".to_vec())];
    for (record, content) in records {
        set_record(&mut region, record, SIGNATURE, content.len(), content.len(), &content);
    }
    assert_eq!(parse(&region).unwrap(), ["second"]);
}

#[test]
fn a_ring_that_has_wrapped_round_is_unrolled() {
    let content = panic_text(1, "the end\n");
    let (newer, older) = (&content[30..], &content[..30]);
    let mut region = vec![0; PANIC_LOG_BYTES as usize];
    set_record(&mut region, 0, SIGNATURE, newer.len(), content.len(), &[newer, older].concat());
    assert_eq!(parse(&region).unwrap(), ["the end"]);
}

#[test]
fn what_is_no_panic_is_nothing() {
    let good = panic_text(1, "text\n");
    let replace =
        |from: &str, to: &str| String::from_utf8(good.clone()).unwrap().replace(from, to).into_bytes();
    for content in [
        Vec::new(),
        b"text\n".to_vec(),
        b"====1.2-D".to_vec(),
        replace("====", "==="),
        replace("-D", "-C"),
        replace("Panic", "Oops"),
        replace("Panic#1", "Panic#-1"),
        replace("Panic#1", "Panic#99999999999999999999999"),
        replace("Part1", "Part2"),
    ] {
        assert_eq!(parse(&region(&content)), None, "{}", String::from_utf8_lossy(&content));
    }
    assert_eq!(parse(&vec![0; PANIC_LOG_BYTES as usize]), None);
    assert_eq!(parse(&[]), None);
    assert_eq!(parse(&region(&good)[..RECORD_BYTES as usize - 1]), None);
}

#[test]
fn sizes_that_lie_are_nothing() {
    let content = panic_text(1, "text\n");
    let ring = RECORD_BYTES as usize - HEADER_BYTES;
    let max = u32::MAX as usize;
    for (signature, start, size) in [
        (SIGNATURE + 1, 0, content.len()),
        (SIGNATURE, content.len() + 1, content.len()),
        (SIGNATURE, 0, ring + 1),
        (SIGNATURE, 0, max),
        (SIGNATURE, max, max),
    ] {
        let mut region = vec![0; PANIC_LOG_BYTES as usize];
        set_record(&mut region, 0, signature, start, size, &content);
        assert_eq!(parse(&region), None, "{start} {size}");
    }
    let mut region = vec![0; PANIC_LOG_BYTES as usize];
    set_record(&mut region, 0, SIGNATURE, 0, ring, &content);
    assert_eq!(parse(&region).unwrap()[0], "text");
}

#[test]
fn random_regions_are_survived() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..500 {
        let mut log = panic_text(1, "");
        log.extend((0..random() % 16_000).map(|_| b"<>0123\n\t\xff "[random() as usize % 10]));
        let mut region = region(&log);
        for _ in 0..4 {
            let at = random() as usize % 64;
            region[at] = random() as u8;
        }
        if let Some(lines) = parse(&region) {
            assert!(lines.len() <= MAX_LINES);
            assert!(lines.iter().all(|line| line.len() <= MAX_LINE_BYTES));
            assert!(lines.iter().all(|line| line.bytes().all(|byte| (b' '..=b'~').contains(&byte))));
        }
    }
}

#[test]
fn the_words_keep_the_region_to_panics() {
    let words = words(0x3ff_0000);
    assert!(
        words.starts_with(
            "ramoops.mem_address=0x3ff0000 ramoops.mem_size=0x10000 ramoops.record_size=0x4000 "
        )
    );
    assert!(words.split(' ').all(|word| word.contains('=')));
}
