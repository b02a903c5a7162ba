//! Unix sockets at paths of any length.
//!
//! The kernel takes 107 bytes of a socket's path (`sockaddr_un`). Engines that keep state below directories of
//! their own and name it by 64 hexadecimal digits pass that, so a longer path is reached through its directory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The most bytes of a path that the kernel takes, the final zero not counted.
const MAX_BYTES: usize = 107;

/// Listens at a path.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    at(path, |path| UnixListener::bind(path))
}

/// Connects to who listens at a path.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    at(path, |path| UnixStream::connect(path))
}

fn at<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= MAX_BYTES {
        return act(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = File::open(parent)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn paths_of_any_length_lead_to_the_listener() {
        let top = tempfile::tempdir().unwrap();
        for depth in [0, 1, 4] {
            let directory = (0..depth).fold(top.path().to_owned(), |path, _| path.join("x".repeat(100)));
            std::fs::create_dir_all(&directory).unwrap();
            let path = directory.join("s");
            assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
            let listener = bind(&path).unwrap();
            assert!(path.exists());
            connect(&path).unwrap().write_all(b"x").unwrap();
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            assert_eq!(text, "x");
            assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        }
    }

    #[test]
    fn a_name_that_is_too_long_is_an_error() {
        let path = Path::new("/tmp").join("x".repeat(300));
        assert!(bind(&path).is_err());
        assert!(connect(&path).is_err());
    }
}
