//! How a program under test ended, and what a test expects of that.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// How a program under test ended, with all its output.
#[derive(Clone)]
pub struct Outcome {
    /// The command line, for messages.
    pub command: String,
    /// Its status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// The exit code, if it exited.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails unless the exit code is `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code(), Some(code), "another exit code was expected\n{self}");
        self
    }

    /// Fails unless it ended with 0 and exactly this on standard output.
    #[track_caller]
    pub fn expect_stdout(self, text: &str) -> Self {
        let this = self.expect_code(0);
        assert_eq!(this.out(), text, "another output was expected\n{this}");
        this
    }

    /// Fails unless standard output has this line (surrounding blanks aside).
    #[track_caller]
    pub fn expect_line(self, line: &str) -> Self {
        assert!(self.out().lines().any(|l| l.trim() == line), "the line {line:?} is missing\n{self}");
        self
    }

    /// Fails unless it ended with `code` and standard error has every one of `words`.
    #[track_caller]
    pub fn expect_error(self, code: i32, words: &[&str]) -> Self {
        let this = self.expect_code(code);
        for word in words {
            assert!(this.err().contains(word), "standard error does not mention {word:?}\n{this}");
        }
        assert!(!this.err().contains("panicked at"), "the runtime panicked\n{this}");
        this
    }

    /// Fails unless every one of `words` is on one of its outputs: some programs print errors of others on standard
    /// output.
    #[track_caller]
    pub fn expect_words(self, words: &[&str]) -> Self {
        for word in words {
            assert!((self.out() + &self.err()).contains(word), "it does not mention {word:?}\n{self}");
        }
        self
    }

    /// The value of a `NAME=value` line on standard output.
    #[track_caller]
    pub fn value(&self, name: &str) -> String {
        let out = self.out();
        let found = out.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("no line {name}=… on standard output\n{self}")).trim().to_owned()
    }

    /// Fails unless the `name=value` line on standard output is just this.
    #[track_caller]
    pub fn expect_value(&self, name: &str, value: &str) -> &Self {
        assert_eq!(self.value(name), value, "{name} was to be {value:?}\n{self}");
        self
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "--- {}", self.command)?;
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => writeln!(f, "--- exit code {code}")?,
            (None, signal) => writeln!(f, "--- killed by signal {signal:?}")?,
        }
        for (name, bytes) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            writeln!(f, "--- {name}, {} bytes", bytes.len())?;
            let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
            writeln!(f, "{}", String::from_utf8_lossy(shown))?;
        }
        Ok(())
    }
}

/// How much of an output a message shows.
const SHOWN_BYTES: usize = 8 << 10;
