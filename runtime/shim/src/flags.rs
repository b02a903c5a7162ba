//! The command line that containerd gives, with flags as Go programs have them: one dash or two, the value after a
//! blank or an equals sign.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// What to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Start a shim, or find the one that the container belongs to.
    Start,
    /// Have what a dead shim has left of a container removed.
    Delete,
    /// Remove it: what `delete` starts.
    Remove,
    /// Say what the runtime can do.
    Info,
    /// Say which version this is.
    Version,
    /// Be a shim: what `start` starts.
    Serve,
}

/// The command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Flags {
    /// The action.
    pub action: Action,
    /// The namespace of containerd.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// Its bundle, where that is not the working directory.
    pub bundle: Option<PathBuf>,
    /// Whether to say more.
    pub debug: bool,
}

/// Why a command line makes no sense.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum FlagsError {
    /// A flag that does not exist.
    #[error("there is no flag {0}")]
    Unknown(String),
    /// A flag without its value.
    #[error("the flag {0} needs a value")]
    NoValue(String),
    /// No action, or one that does not exist.
    #[error("this is for containerd to start, with `start`, `delete` or -info; not with {0:?}")]
    Action(String),
    /// It has to be said whose container is meant.
    #[error("the flags -namespace and -id are needed")]
    NoContainer,
}

impl Flags {
    /// Reads the words after the program's name.
    pub fn parse(words: &[OsString]) -> Result<Self, FlagsError> {
        let text = |word: &OsStr| word.to_string_lossy().into_owned();
        let mut words = words.iter();
        let (mut namespace, mut id, mut bundle, mut debug) = (String::new(), String::new(), None, false);
        let (mut wanted, mut last) = (None, String::new());
        while let Some(word) = words.next() {
            let word = text(word);
            let Some(flag) = word.strip_prefix('-') else {
                last = word;
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, mut value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (flag, None),
            };
            let mut value =
                || value.take().or_else(|| words.next().cloned()).ok_or(FlagsError::NoValue(word.clone()));
            match name {
                "debug" => debug = true,
                "info" => wanted = Some(Action::Info),
                "v" | "version" => wanted = Some(Action::Version),
                "namespace" => namespace = text(&value()?),
                "id" => id = text(&value()?),
                "bundle" => {
                    bundle = Some(PathBuf::from(value()?)).filter(|path| !path.as_os_str().is_empty())
                }
                // Where containerd is, which the environment says as well, and a socket of its choice.
                "address" | "publish-binary" | "socket" => drop(value()?),
                _ => return Err(FlagsError::Unknown(word)),
            }
        }
        let action = match (wanted, last.as_str()) {
            (Some(wanted), _) => wanted,
            (None, "start") => Action::Start,
            (None, "delete") => Action::Delete,
            (None, "remove") => Action::Remove,
            (None, "serve") => Action::Serve,
            (None, _) => return Err(FlagsError::Action(last)),
        };
        if matches!(action, Action::Start | Action::Delete | Action::Remove | Action::Serve)
            && (namespace.is_empty() || id.is_empty())
        {
            return Err(FlagsError::NoContainer);
        }
        Ok(Self { action, namespace, id, bundle, debug })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagsError> {
        Flags::parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_command_lines_of_containerd_are_understood() {
        let start = parse("-namespace k8s.io -address /a.sock -publish-binary /bin/containerd -id c1 start");
        let expected = Flags {
            action: Action::Start,
            namespace: "k8s.io".into(),
            id: "c1".into(),
            bundle: None,
            debug: false,
        };
        assert_eq!(start, Ok(expected.clone()));
        let delete = parse("--namespace=k8s.io -address= -id=c1 -bundle /b -debug delete");
        let expected = Flags { action: Action::Delete, bundle: Some("/b".into()), debug: true, ..expected };
        assert_eq!(delete, Ok(expected));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn nonsense_is_named() {
        assert_eq!(parse("-frobnicate start"), Err(FlagsError::Unknown("-frobnicate".into())));
        assert_eq!(parse("start"), Err(FlagsError::NoContainer));
        assert_eq!(parse("-namespace n -id"), Err(FlagsError::NoValue("-id".into())));
        assert!(parse("").unwrap_err().to_string().contains("containerd"));
    }
}
