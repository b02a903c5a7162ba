//! Files that others read while they are written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Puts a file with these bytes in the place of another, by way of a name in the same directory: a reader sees the
/// old file or the new one, and nothing between. A failure leaves the old one and nothing else.
pub fn replace(path: &Path, by_way_of: &Path, bytes: &[u8]) -> io::Result<()> {
    let write = || {
        File::create(by_way_of)?.write_all(bytes)?;
        fs::rename(by_way_of, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(by_way_of)))
}
