//! The name of a sandbox.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A sandbox's id: 1 to 64 characters of `A-Z a-z 0-9 _ . + -`, starting with a letter or digit.
///
/// 64 is what container engines use.
#[derive(Clone, Debug, Deserialize, Hash, Eq, PartialEq, Ord, PartialOrd, Serialize)]
#[serde(try_from = "String")]
pub struct SandboxId(String);

/// The most characters of an id.
pub const MAX_ID_CHARS: usize = 64;

/// Why a text is no id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot be a sandbox's id: use 1 to 64 letters, digits, `_`, `.`, `+` and `-`, the first of them a \
     letter or digit"
)]
pub struct InvalidId(String);

impl SandboxId {
    /// An id that nobody else has chosen.
    pub fn random() -> Self {
        let mut bytes = [0; 6];
        // A source that fails leaves zeros: the claim of the directory then finds the clash.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        Self(format!("sb-{}", bytes.map(|b| format!("{b:02x}")).concat()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SandboxId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '+' | '-');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        match starts_well && text.len() <= MAX_ID_CHARS && text.chars().all(plain) {
            true => Ok(Self(text)),
            false => Err(InvalidId(text)),
        }
    }
}

impl FromStr for SandboxId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_ids_are_taken_and_paths_are_not() {
        for good in ["a", "web-1", "A_b.c+d", &"f".repeat(64)] {
            assert!(good.parse::<SandboxId>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\0", &"f".repeat(65)] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<SandboxId>("\"../x\"").is_err());
    }

    #[test]
    fn random_ids_are_ids_and_differ() {
        let (a, b) = (SandboxId::random(), SandboxId::random());
        assert_ne!(a, b);
        assert!(a.as_str().parse::<SandboxId>().is_ok());
    }
}
