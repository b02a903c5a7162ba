//! Messages for the user: on standard error as plain lines, and in the log file of `--log` in the form that
//! `--log-format` asks for. Engines read the last JSON line of that file for an error's text, so it is appended
//! to and never cut.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::SystemTime;

use serde_json::json;

use crate::state::rfc3339;

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum Format {
    /// `time="…" level=error msg="…"`.
    #[default]
    Text,
    /// `{"level":"error","msg":"…","time":"…"}`, as runc writes it.
    Json,
}

/// How much a message matters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Level {
    /// Only with `--debug`.
    Debug,
    /// Good to know.
    Info,
    /// Something was not as asked for.
    Warning,
    /// Something failed.
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Where messages go.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    format: Format,
    least: Level,
}

impl Log {
    /// Opens the log file, if there is to be one.
    pub fn open(path: Option<&Path>, format: Format, least: Level) -> io::Result<Self> {
        let file = path.map(|path| File::options().append(true).create(true).open(path)).transpose()?;
        Ok(Self { file, format, least })
    }

    /// A log to standard error only.
    pub fn plain() -> Self {
        Self { file: None, format: Format::Text, least: Level::Info }
    }

    /// Writes a message. One that cannot be written has nobody to complain to.
    pub fn write(&self, level: Level, message: &str) {
        if level == Level::Debug && self.least != Level::Debug {
            return;
        }
        let line = line(self.format, level, message, &rfc3339(SystemTime::now()));
        if let Some(mut file) = self.file.as_ref() {
            let _ = file.write_all(line.as_bytes());
        }
        let for_people = match (&self.file, self.format) {
            (None, Format::Json) => line,
            _ => format!("sandbox: {message}\n"),
        };
        let _ = io::stderr().write_all(for_people.as_bytes());
    }

    /// Writes an error.
    pub fn error(&self, message: &str) {
        self.write(Level::Error, message);
    }

    /// Writes that something is not as it was asked for.
    pub fn warn(&self, message: &str) {
        self.write(Level::Warning, message);
    }

    /// Writes something good to know.
    pub fn info(&self, message: &str) {
        self.write(Level::Info, message);
    }

    /// Writes something for those who look for a fault.
    pub fn debug(&self, message: &str) {
        self.write(Level::Debug, message);
    }
}

fn line(format: Format, level: Level, message: &str, time: &str) -> String {
    match format {
        Format::Json => format!("{}\n", json!({"level": level.name(), "msg": message, "time": time})),
        Format::Text => format!("time=\"{time}\" level={} msg={}\n", level.name(), json!(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_lines_are_as_runc_writes_them() {
        let text = line(Format::Json, Level::Error, "a \"quoted\"\nmessage", "2026-01-01T00:00:00.000000Z");
        assert_eq!(
            text,
            "{\"level\":\"error\",\"msg\":\"a \\\"quoted\\\"\\nmessage\",\"time\":\"2026-01-01T00:00:00.000000Z\"}\n"
        );
    }

    #[test]
    fn a_log_file_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for message in ["first", "second"] {
            Log::open(Some(&path), Format::Text, Level::Info).unwrap().error(message);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let messages: Vec<_> = text.lines().map(|line| line.rsplit_once("msg=").unwrap().1).collect();
        assert_eq!(messages, ["\"first\"", "\"second\""]);
    }
}
