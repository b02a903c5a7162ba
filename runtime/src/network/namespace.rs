//! A network namespace of the host, entered for a moment.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::NetworkError;

/// That of whoever asks.
pub const OWN: &str = "/proc/self/ns/net";

/// A network namespace that is not the runtime's own.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    file: File,
}

impl Namespace {
    /// Opens the namespace at a path.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let open = |path: &Path| {
            // Whatever is at the path, opening it must not wait.
            File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path)
                .and_then(|file| Ok((file.metadata()?, file)))
                .map_err(|error| NetworkError::Open { path: path.into(), error })
        };
        let (data, file) = open(path)?;
        let (own, _) = open(Path::new(OWN))?;
        if (data.dev(), data.ino()) == (own.dev(), own.ino()) {
            return Err(NetworkError::Host(path.into()));
        }
        Ok(Self { path: path.into(), file })
    }

    /// Its descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Does something in it, on a thread that ends with that: a namespace belongs to a thread. Sockets and taps that
    /// are opened there stay in it.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetworkError> {
        let failed = |error| NetworkError::Enter { path: self.path.clone(), error };
        let enter = || -> io::Result<()> {
            Ok(move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("network".into())
                .spawn_scoped(scope, || enter().map(|()| work()))
                .map_err(failed)?;
            match thread.join() {
                Ok(done) => done.map_err(failed),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_of_its_own_is_told_apart() {
        let error = |path: &str| Namespace::open(Path::new(path)).unwrap_err().to_string();
        assert!(error("/run/netns/no-such-namespace").contains("No such file"));
        assert!(error(OWN).contains("host's own network"));
        let other = Namespace::open(Path::new("/proc/self/ns/uts")).unwrap();
        let refused = other.within(|| ()).unwrap_err().to_string();
        assert!(refused.contains("no network namespace"), "{refused}");
    }
}
