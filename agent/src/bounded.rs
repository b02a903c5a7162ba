//! Files of the kernel's that tell of a container, read up to a limit: how long they are may be the container's
//! doing.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The text of a file, or as many of its lines as the limit allows.
#[derive(Debug, Default, PartialEq)]
pub struct Text {
    /// Whole lines; what is no UTF-8 is replaced.
    pub text: String,
    /// Whether the file has more.
    pub cut: bool,
}

/// Reads the lines of a file, of at most `limit` bytes together.
pub fn read_text(path: &Path, limit: usize) -> io::Result<Text> {
    Ok(whole_lines(read(path, limit + 1)?, limit))
}

/// Reads the first `limit` bytes of a file.
pub fn read(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A line that is cut off would be another number.
fn whole_lines(mut bytes: Vec<u8>, limit: usize) -> Text {
    let cut = bytes.len() > limit;
    if cut {
        bytes.truncate(limit);
        let end = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |newline| newline + 1);
        bytes.truncate(end);
    }
    Text { text: String::from_utf8_lossy(&bytes).into_owned(), cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_there_as_a_whole_or_not_at_all() {
        let text = |limit| whole_lines(b"12\n345\n".to_vec(), limit);
        assert_eq!(text(7), Text { text: "12\n345\n".into(), cut: false });
        assert_eq!(text(6), Text { text: "12\n".into(), cut: true });
        assert_eq!(text(2), Text { text: String::new(), cut: true });
    }

    #[test]
    fn a_file_without_end_is_read_up_to_the_limit() {
        let endless = Path::new("/dev/zero");
        assert_eq!(read(endless, 5).unwrap(), [0; 5]);
        assert_eq!(read_text(endless, 5).unwrap(), Text { text: String::new(), cut: true });
    }
}
