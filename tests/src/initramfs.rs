//! A guest image of one program, for driving `sandbox-vmm` without the agent.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::place::binary;

/// Writes an initramfs to `path` that holds the probe as `/init` and the directories it mounts things on; and, if
/// one is given, the task that the probe does without being told on the kernel's command line.
pub fn write(path: &Path, task: Option<&str>) -> io::Result<()> {
    let mut image = fs::File::create(path)?;
    for (inode, directory) in (1..).zip(["dev", "proc", "sys", "mnt"]) {
        entry(&mut image, inode, directory, 0o040_755, &[])?;
    }
    // A guest without a console starts its first program without standard streams, and Rust's runtime then wants
    // this.
    device(&mut image, 99, "dev/null", (1, 3))?;
    entry(&mut image, 100, "init", 0o100_755, &fs::read(binary("sandbox-probe"))?)?;
    if let Some(task) = task {
        entry(&mut image, 101, "task", 0o100_644, task.as_bytes())?;
    }
    entry(&mut image, 0, "TRAILER!!!", 0, &[])
}

/// Writes an archive of one file to `path`.
pub fn write_file(path: &Path, name: &str, data: &[u8]) -> io::Result<()> {
    let mut image = fs::File::create(path)?;
    entry(&mut image, 1, name, 0o100_644, data)?;
    entry(&mut image, 0, "TRAILER!!!", 0, &[])
}

fn device(to: &mut impl Write, inode: u32, name: &str, (major, minor): (u32, u32)) -> io::Result<()> {
    node(to, inode, name, 0o020_666, (major, minor), &[])
}

fn entry(to: &mut impl Write, inode: u32, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
    node(to, inode, name, mode, (0, 0), data)
}

/// One entry in the "newc" format: a header of hexadecimal fields, the name, the data, each padded to 4 bytes.
fn node(
    to: &mut impl Write,
    inode: u32,
    name: &str,
    mode: u32,
    (major, minor): (u32, u32),
    data: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(data.len()).map_err(io::Error::other)?;
    let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
    let header_and_name = 110 + name.len() + 1;
    write!(to, "070701")?;
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
        write!(to, "{field:08x}")?;
    }
    write!(to, "{name}\0")?;
    to.write_all(&[0; 3][..header_and_name.next_multiple_of(4) - header_and_name])?;
    to.write_all(data)?;
    to.write_all(&[0; 3][..data.len().next_multiple_of(4) - data.len()])
}
