//! Which file a command names, as the shell and runc find it: through `PATH` unless it has a slash.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use sandbox_protocol::FailureKind;

/// A command that cannot be executed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is none.
    #[error("process.args is empty: there is nothing to execute")]
    Empty,
    /// No directory of `PATH` has it.
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    /// The file does not exist.
    #[error("exec: {command:?}: stat {path}: {}", words(source))]
    Missing {
        /// As it was asked for.
        command: String,
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// It is not for executing.
    #[error("exec: {command:?}: {reason}")]
    NotExecutable {
        /// As it was asked for.
        command: String,
        /// Why not.
        reason: String,
    },
    /// The kernel refused it.
    #[error("exec {path}: {source}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// An argument or a variable has a zero byte.
    #[error("{0} has a zero byte in it")]
    ZeroByte(&'static str),
}

impl CommandError {
    /// The kind, for exit codes.
    pub fn kind(&self) -> FailureKind {
        use std::io::ErrorKind::NotFound;
        match self {
            Self::Empty | Self::NotInPath(_) | Self::Missing { .. } => FailureKind::CommandNotFound,
            // The file is there, but the interpreter that it names is not.
            Self::Refused { source, .. } if source.kind() == NotFound => FailureKind::CommandNotFound,
            Self::NotExecutable { .. } | Self::Refused { .. } => FailureKind::CommandNotExecutable,
            Self::ZeroByte(_) => FailureKind::Other,
        }
    }
}

/// What the kernel says, in the words and the case of runc's errors, by which engines tell 127 from other codes.
fn words(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file or directory".into(),
        std::io::ErrorKind::NotADirectory => "not a directory".into(),
        _ => error.to_string(),
    }
}

/// Finds the file of a command, with the rights, root and working directory that this process has now.
pub fn find(command: &str, path: Option<&str>) -> Result<PathBuf, CommandError> {
    if command.contains('/') {
        check(Path::new(command)).map_err(|fault| fault.of(command))?;
        return Ok(command.into());
    }
    let directories = path.unwrap_or_default().split(':').filter(|directory| !directory.is_empty());
    directories
        .map(|directory| Path::new(directory).join(command))
        .find(|file| !command.is_empty() && check(file).is_ok())
        .ok_or_else(|| CommandError::NotInPath(command.to_owned()))
}

#[derive(Debug)]
enum Fault {
    Missing(PathBuf, std::io::Error),
    NotExecutable(&'static str),
}

impl Fault {
    fn of(self, command: &str) -> CommandError {
        let command = command.to_owned();
        match self {
            Self::Missing(path, source) => CommandError::Missing { command, path, source },
            Self::NotExecutable(reason) => CommandError::NotExecutable { command, reason: reason.to_owned() },
        }
    }
}

fn check(file: &Path) -> Result<(), Fault> {
    let metadata = match std::fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(Fault::NotExecutable("permission denied"));
        }
        Err(e) => return Err(Fault::Missing(file.to_owned(), e)),
    };
    if metadata.is_dir() {
        return Err(Fault::NotExecutable("is a directory"));
    }
    let executable = metadata.permissions().mode() & 0o111 != 0
        && accessat(CWD, file, Access::EXEC_OK, AtFlags::EACCESS).is_ok();
    if metadata.is_file() && executable { Ok(()) } else { Err(Fault::NotExecutable("permission denied")) }
}

/// Strings for the kernel.
#[derive(Debug)]
pub struct Strings {
    owned: Vec<CString>,
}

impl Strings {
    /// Takes the strings; `what` they are is for the error.
    pub fn new<S: AsRef<str>>(
        strings: impl IntoIterator<Item = S>,
        what: &'static str,
    ) -> Result<Self, CommandError> {
        let owned: Result<Vec<CString>, _> = strings.into_iter().map(|s| CString::new(s.as_ref())).collect();
        Ok(Self { owned: owned.map_err(|_| CommandError::ZeroByte(what))? })
    }

    fn pointers(&self) -> Vec<*const libc::c_char> {
        self.owned.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    }
}

/// Executes a file. It returns only where the kernel refuses it.
pub fn execute(path: &Path, arguments: &Strings, environment: &Strings) -> CommandError {
    let Ok(file) = CString::new(OsStr::as_bytes(path.as_os_str())) else {
        return CommandError::ZeroByte("process.args");
    };
    let (argv, envp) = (arguments.pointers(), environment.pointers());
    // SAFETY: all pointers are to strings that live until the call returns, and both lists end in null.
    unsafe { libc::execve(file.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    CommandError::Refused { path: path.to_owned(), source: std::io::Error::last_os_error() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_found_in_the_first_directory_that_can_execute_it() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (dir, mode) in dirs.iter().zip([0o644, 0o755]) {
            let file = dir.path().join("tool");
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
        }
        let path = format!("{}:{}", dirs[0].path().display(), dirs[1].path().display());
        assert_eq!(find("tool", Some(&path)).unwrap(), dirs[1].path().join("tool"));
        let error = find("other", Some(&path)).unwrap_err();
        assert_eq!(error.to_string(), "exec: \"other\": executable file not found in $PATH");
        assert_eq!(error.kind(), FailureKind::CommandNotFound);
    }

    #[test]
    fn a_path_says_what_is_wrong_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("data");
        std::fs::write(&file, "").unwrap();
        let find = |path: &Path| find(path.to_str().unwrap(), None).unwrap_err();
        assert_eq!(find(dir.path()).kind(), FailureKind::CommandNotExecutable);
        assert_eq!(find(&file).kind(), FailureKind::CommandNotExecutable);
        assert!(find(&file).to_string().ends_with("permission denied"));
        assert_eq!(find(&dir.path().join("none")).kind(), FailureKind::CommandNotFound);
    }

    #[test]
    fn without_a_path_no_name_is_found() {
        assert!(matches!(find("sh", None), Err(CommandError::NotInPath(_))));
        assert!(matches!(find("", Some("/bin")), Err(CommandError::NotInPath(_))));
    }
}
