//! A program that logs the output of a container: `binary://PATH?KEY=VALUE&…`.
//!
//! It gets output, errors and a pipe as descriptors 3, 4 and 5, the keys and values as its arguments, and the
//! container's id and namespace in its environment. It closes the pipe when it is ready.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sandbox_runtime::descriptor::{self, Ties};
use sandbox_runtime::process;

/// How long a program may take to write what it has read, once there is no more.
const END_TIME: Duration = Duration::from_secs(10);

/// A running one. Dropping it waits for its end, and ends it where it does not by itself.
#[derive(Debug)]
pub struct Logger(Child);

impl Logger {
    /// Starts a program and waits until it is ready. Returns where output and errors are to be written.
    pub fn start(
        path: &Path,
        args: &[String],
        id: &str,
        namespace: &str,
    ) -> io::Result<(Self, [OwnedFd; 2])> {
        let (out, to_out) = io::pipe()?;
        let (err, to_err) = io::pipe()?;
        let (mut ready, is_ready) = io::pipe()?;
        let mut command = Command::new(path);
        command.args(args).env_clear();
        command.env("CONTAINER_ID", id).env("CONTAINER_NAMESPACE", namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let given = [(out.as_fd(), 3), (err.as_fd(), 4), (is_ready.as_fd(), 5)];
        descriptor::give(&mut command, &given, Ties::None)?;
        let logger = Self(command.spawn()?);
        drop((command, out, err, is_ready));
        // Its end, or anything it writes, says so as well.
        let _ = ready.read(&mut [0])?;
        Ok((logger, [to_out.into(), to_err.into()]))
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Ok(pidfd) = process::pidfd(self.0.id())
            && !process::wait_for(&pidfd, Instant::now() + END_TIME)
        {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_program_logs_both_streams_until_they_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = format!(
            "exec 5>&-; {{ echo $CONTAINER_NAMESPACE/$CONTAINER_ID $0; cat <&3; cat <&4; }} >{}",
            log.display()
        );
        let args = ["-c".to_owned(), script, "argument".to_owned()];
        let (logger, [out, err]) = Logger::start(Path::new("/bin/sh"), &args, "id", "ns").unwrap();
        File::from(out).write_all(b"out\n").unwrap();
        File::from(err).write_all(b"err\n").unwrap();
        drop(logger);
        assert_eq!(std::fs::read_to_string(log).unwrap(), "ns/id argument\nout\nerr\n");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        assert!(Logger::start(Path::new("/nowhere"), &[], "id", "ns").is_err());
    }
}
