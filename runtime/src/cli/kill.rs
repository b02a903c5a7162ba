//! `sandbox kill`.

use nix::sys::signal::Signal;

use super::{Error, Global};
use crate::lifecycle;
use crate::state::SandboxId;

/// The arguments of `sandbox kill`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// The signal, by name or number
    #[arg(default_value = "TERM")]
    signal: String,
    /// Send it to every process of the sandbox
    #[arg(long, short)]
    all: bool,
}

/// Sends a signal to a sandbox's process.
pub fn kill(args: &Args, global: &Global) -> Result<u8, Error> {
    let signal = number(&args.signal).ok_or_else(|| {
        Error::Usage(format!(
            "`{}` is no signal: write a name such as TERM or a number from 1 to 64",
            args.signal
        ))
    })?;
    lifecycle::signal(&args.id, &global.root(), signal, args.all)?;
    Ok(0)
}

fn number(text: &str) -> Option<i32> {
    const LAST_SIGNAL: i32 = 64;
    if let Ok(number) = text.parse() {
        return (1..=LAST_SIGNAL).contains(&number).then_some(number);
    }
    let name = text.to_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<Signal>().ok().map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in [
            ("TERM", Some(15)),
            ("SIGTERM", Some(15)),
            ("kill", Some(9)),
            ("1", Some(1)),
            ("64", Some(64)),
            ("0", None),
            ("65", None),
            ("-9", None),
            ("NOPE", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }
}
