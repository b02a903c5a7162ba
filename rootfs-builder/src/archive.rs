//! The initramfs: a cpio archive in the `newc` format that Linux unpacks into its first root file system
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` in the kernel's tree).
//!
//! Owner, times and inode numbers are fixed, and the order is that of [`entries`], so that the bytes depend on
//! the agent alone. Besides the agent there are the two devices that a program may expect before it has mounted
//! anything: `/dev/console`, which the kernel opens as its standard streams, and `/dev/null`, which Rust's
//! runtime opens in their place when there is no console.

use std::io::{self, Write};

use cpio::newc::{self, ModeFileType};

/// What one entry of the archive is.
enum Node<'a> {
    Directory,
    Program(&'a [u8]),
    CharacterDevice { major: u32, minor: u32 },
}

/// An entry of the archive, owned by root.
struct Entry<'a> {
    name: &'static str,
    permissions: u32,
    node: Node<'a>,
}

fn entries(agent: &[u8]) -> [Entry<'_>; 4] {
    [
        Entry { name: "dev", permissions: 0o755, node: Node::Directory },
        Entry { name: "dev/console", permissions: 0o600, node: Node::CharacterDevice { major: 5, minor: 1 } },
        Entry { name: "dev/null", permissions: 0o666, node: Node::CharacterDevice { major: 1, minor: 3 } },
        Entry { name: "init", permissions: 0o755, node: Node::Program(agent) },
    ]
}

/// The archive with `agent` as `/init`.
///
/// # Errors
/// When the agent has 4 GiB or more, which the format's 32-bit sizes cannot say.
pub fn pack(agent: &[u8]) -> io::Result<Vec<u8>> {
    let mut archive = Vec::with_capacity(agent.len() + 1024);
    for (inode, entry) in (1..).zip(entries(agent)) {
        append(&mut archive, inode, &entry)?;
    }
    newc::trailer(archive)
}

fn append(archive: &mut Vec<u8>, inode: u32, entry: &Entry<'_>) -> io::Result<()> {
    let builder = newc::Builder::new(entry.name).ino(inode).mode(entry.permissions).uid(0).gid(0).mtime(0);
    let (builder, content) = match entry.node {
        Node::Directory => (builder.nlink(2).set_mode_file_type(ModeFileType::Directory), &[][..]),
        Node::Program(bytes) => (builder.nlink(1).set_mode_file_type(ModeFileType::Regular), bytes),
        Node::CharacterDevice { major, minor } => {
            let builder = builder.nlink(1).rdev_major(major).rdev_minor(minor);
            (builder.set_mode_file_type(ModeFileType::Char), &[][..])
        }
    };
    let size = u32::try_from(content.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let mut writer = builder.write(archive, size);
    writer.write_all(content)?;
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_archive_holds_the_agent_two_devices_and_nothing_else() {
        let archive = pack(b"the agent").unwrap();
        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0), "{}", entry.name());
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let device = (entry.rdev_major(), entry.rdev_minor());
            found.push((entry.name().to_owned(), entry.mode(), device, content));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("dev", 0o040755, (0, 0), &b""[..]),
            ("dev/console", 0o020600, (5, 1), b""),
            ("dev/null", 0o020666, (1, 3), b""),
            ("init", 0o100755, (0, 0), b"the agent"),
        ];
        let expected =
            expected.map(|(name, mode, device, content)| (name.to_owned(), mode, device, content.to_vec()));
        assert_eq!(found, expected);
    }

    #[test]
    fn the_kernel_can_find_every_header_on_a_multiple_of_four() {
        for length in 0..8 {
            let archive = pack(&vec![b'x'; length]).unwrap();
            let headers = archive.windows(6).enumerate().filter(|(_, window)| window == b"070701");
            let offsets: Vec<_> = headers.map(|(offset, _)| offset).collect();
            assert_eq!(offsets.len(), 5, "four entries and the trailer");
            assert!(offsets.iter().all(|offset| offset % 4 == 0), "{offsets:?}");
        }
    }
}
