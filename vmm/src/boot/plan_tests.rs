use std::io::Write as _;

use vm_memory::Bytes as _;

use super::*;

const AT: u64 = 0x10_0800;

/// A plan of one file and part.
fn plan(content: &[u8], part: Part) -> Plan {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let files = [GuestFile::kernel(file.path()).unwrap(), GuestFile::image(file.path()).unwrap()];
    let guest = Guest { entry: GuestAddress(AT), initramfs: part.to };
    Plan { guest, pieces: cut(IMAGE, part).collect(), files, next: AtomicUsize::new(0) }
}

#[test]
fn two_threads_copy_each_byte_to_its_place() {
    let content: Vec<u8> = (0..(3 * PIECE_BYTES + 77)).map(|index| (index % 251) as u8).collect();
    let to = Extent { start: AT, len: content.len() as u64 - 5 };
    let plan = plan(&content, Part { offset: 5, to });
    let memory = crate::memory::map(Layout::new(8 << 20)).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| plan.work(&memory));
        plan.work(&memory).unwrap();
        other.join().unwrap().unwrap();
    });
    let mut loaded = vec![0; content.len() + 1];
    memory.read_slice(&mut loaded, GuestAddress(AT - 3)).unwrap();
    assert!(loaded[..3] == [0; 3] && loaded[3..][..content.len() - 5] == content[5..]);
    assert_eq!(loaded[content.len() - 2..], [0; 3]);
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    let part = Part { offset: 0, to: Extent { start: AT, len: 2 * PIECE_BYTES } };
    let plan = plan(&[1; 5000], part);
    let memory = crate::memory::map(Layout::new(8 << 20)).unwrap();
    let error = plan.work(&memory).unwrap_err().to_string();
    assert!(error.contains("has become shorter"), "{error}");
    assert!(plan.work(&memory).is_ok(), "what is left is given up");
}

#[test]
fn nothing_is_copied_after_giving_up() {
    let part = Part { offset: 0, to: Extent { start: AT, len: 100 } };
    let plan = plan(&[1; 100], part);
    let memory = crate::memory::map(Layout::new(8 << 20)).unwrap();
    plan.give_up();
    plan.work(&memory).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(AT)).unwrap(), 0);
}
