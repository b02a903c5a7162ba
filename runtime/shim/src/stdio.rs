//! Where the streams of a process go.
//!
//! containerd names them: fifos that it or a client of its reads and writes, a file (`file://`), or a program that logs
//! (`binary://`). The process's own ends go to the sandbox's monitor, which carries the bytes; nothing is copied here.
//! What stays here are the other ends of the fifos: a reader that goes away, such as a containerd that is restarted,
//! then ends no stream, and input ends when containerd says so, not when the writer of the moment does.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use sandbox_runtime::sandbox::Ends;

use crate::logger::Logger;

/// How long the reader of a fifo may take to open it.
const READER_TIME: Duration = Duration::from_secs(30);

const READER_POLL: Duration = Duration::from_millis(2);

/// What containerd says of a process's streams.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Streams {
    /// Whether they are a terminal's.
    pub terminal: bool,
    /// Where input comes from; empty: there is none.
    pub stdin: String,
    /// Where output goes; empty: nowhere.
    pub stdout: String,
    /// Where errors go; empty: nowhere.
    pub stderr: String,
}

/// Why streams cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A file or fifo.
    #[error("cannot open the stream {name:?}: {error}")]
    Open {
        /// As containerd names it.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// A name that is not understood.
    #[error("the stream {0:?} is neither a fifo nor a file:// or binary:// URI")]
    Unknown(String),
    /// A program that logs.
    #[error("cannot start the logging program {}: {error}", path.display())]
    Logger {
        /// The program.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Our ends of a process's streams. Dropping them lets go of the process.
#[derive(Debug, Default)]
pub struct Held {
    /// Keeps input open.
    stdin: Option<File>,
    /// Keep output open.
    _readers: Vec<File>,
    _loggers: Vec<Logger>,
}

impl Held {
    /// Lets input end, once what has been written to it was read and every other writer is gone as well.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }
}

/// The name of a stream, understood.
#[derive(Debug, Eq, PartialEq)]
enum Target {
    Nothing,
    Fifo(PathBuf),
    File(PathBuf),
    Program { path: PathBuf, args: Vec<String> },
}

impl Target {
    fn of(name: &str) -> Result<Self, StdioError> {
        let unknown = || StdioError::Unknown(name.into());
        let Some((scheme, rest)) = name.split_once("://") else {
            return match name {
                "" => Ok(Self::Nothing),
                path if path.starts_with('/') => Ok(Self::Fifo(path.into())),
                _ => Err(unknown()),
            };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path).filter(|path| path.starts_with('/')).ok_or_else(unknown)?);
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" => {
                let mut args = Vec::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    for word in [key, value] {
                        args.push(decode(&word.replace('+', " ")).ok_or_else(unknown)?);
                    }
                }
                Ok(Self::Program { path, args })
            }
            _ => Err(unknown()),
        }
    }
}

/// Undoes the percent encoding of a URI.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next()?, rest.next()?];
        bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

/// Opens the streams of a process of a container.
pub fn open(streams: &Streams, id: &str, namespace: &str) -> Result<(Ends, Held), StdioError> {
    let mut held = Held::default();
    let stdin = match Target::of(&streams.stdin)? {
        Target::Nothing => null()?,
        Target::Fifo(path) => {
            let (reader, writer) = input_ends(&path)?;
            held.stdin = Some(writer);
            reader.into()
        }
        Target::File(_) | Target::Program { .. } => return Err(StdioError::Unknown(streams.stdin.clone())),
    };
    let stderr = if streams.terminal { "" } else { &streams.stderr };
    let (stdout, stderr) = (Target::of(&streams.stdout)?, Target::of(stderr)?);
    let (stdout, stderr) = match (stdout, stderr) {
        (Target::Program { path, args }, stderr) => {
            // One program logs both.
            let (logger, [out, err]) = Logger::start(&path, &args, id, namespace)
                .map_err(|error| StdioError::Logger { path, error })?;
            held._loggers.push(logger);
            let err = if stderr == Target::Nothing { null()? } else { err };
            (out, err)
        }
        (stdout, stderr) => (output(stdout, &mut held)?, output(stderr, &mut held)?),
    };
    Ok((Ends { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr) }, held))
}

fn output(target: Target, held: &mut Held) -> Result<OwnedFd, StdioError> {
    match target {
        Target::Nothing => null(),
        Target::Fifo(path) => {
            let (reader, writer) = output_ends(&path)?;
            held._readers.push(reader);
            // The monitor waits for room, as long as it takes.
            rustix::fs::fcntl_setfl(&writer, OFlags::empty()).map_err(|error| StdioError::Open {
                name: path.display().to_string(),
                error: error.into(),
            })?;
            Ok(writer.into())
        }
        Target::File(path) => {
            let error = |error| StdioError::Open { name: path.display().to_string(), error };
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(error)?;
            }
            let file = File::options().append(true).create(true).mode(0o644).open(&path).map_err(error)?;
            Ok(file.into())
        }
        Target::Program { path, .. } => Err(StdioError::Unknown(path.display().to_string())),
    }
}

/// Opens the ends of a fifo that is written to, once somebody reads it: a reader that comes when the process has ended
/// finds no writer, and what was written is lost to it.
fn output_ends(path: &Path) -> Result<(File, File), StdioError> {
    let deadline = Instant::now() + READER_TIME;
    let writer = loop {
        match open_fifo(path, OFlags::WRONLY) {
            Err(StdioError::Open { error, .. })
                if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error())
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(READER_POLL);
            }
            opened => break opened?,
        }
    };
    Ok((open_fifo(path, OFlags::RDONLY)?, writer))
}

/// Opens the ends of a fifo that is read from. That waits for nobody, since both are ours.
fn input_ends(path: &Path) -> Result<(File, File), StdioError> {
    Ok((open_fifo(path, OFlags::RDONLY)?, open_fifo(path, OFlags::WRONLY)?))
}

fn open_fifo(path: &Path, access: OFlags) -> Result<File, StdioError> {
    let failed = |error: io::Error| StdioError::Open { name: path.display().to_string(), error };
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file =
        File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?);
    match file.metadata().map_err(failed)?.file_type().is_fifo() {
        true => Ok(file),
        false => Err(StdioError::Unknown(path.display().to_string())),
    }
}

fn null() -> Result<OwnedFd, StdioError> {
    let error = |error| StdioError::Open { name: "/dev/null".into(), error };
    Ok(File::options().read(true).write(true).open("/dev/null").map_err(error)?.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn names_are_understood() {
        let program = Target::Program {
            path: "/bin/log".into(),
            args: vec!["--to".into(), "a b&c".into(), "flag".into(), String::new()],
        };
        for (name, target) in [
            ("", Target::Nothing),
            ("/run/fifo", Target::Fifo("/run/fifo".into())),
            ("file:///var/log/a%20b", Target::File("/var/log/a b".into())),
            ("binary:///bin/log?--to=a+b%26c&flag", program),
        ] {
            assert_eq!(Target::of(name).unwrap(), target, "{name}");
        }
        for bad in ["relative", "http://x/", "file://relative", "binary:///bin/%zz", "file:///%"] {
            assert!(Target::of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fifo_outlives_its_reader_and_ends_with_its_last_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        let streams = Streams { stdout: path.to_str().unwrap().into(), ..Streams::default() };
        let first = {
            let path = path.clone();
            std::thread::spawn(move || File::open(path).unwrap())
        };
        let (ends, held) = open(&streams, "id", "ns").unwrap();
        let mut writer = File::from(ends.stdout.unwrap());
        drop(first.join().unwrap());
        writer.write_all(b"all the same").unwrap();
        let mut reader = File::open(&path).unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all the same");
        drop(held);
    }

    #[test]
    fn input_ends_when_it_is_closed_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        let streams = Streams { stdin: path.to_str().unwrap().into(), ..Streams::default() };
        let (ends, mut held) = open(&streams, "id", "ns").unwrap();
        let mut reader = File::from(ends.stdin.unwrap());
        File::options().write(true).open(&path).unwrap().write_all(b"key").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(reader.read(&mut buffer).unwrap(), 3);
        assert_eq!(reader.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        held.close_stdin();
        assert_eq!(reader.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_file_that_is_no_fifo_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let streams = Streams { stdout: file.path().to_str().unwrap().into(), ..Streams::default() };
        assert!(open(&streams, "id", "ns").unwrap_err().to_string().contains("neither a fifo"));
    }
}
