//! `sandbox kill`.

use nix::sys::signal::Signal;

use super::{Error, Global};
use crate::lifecycle;
use crate::state::SandboxId;

// The arguments of `sandbox kill`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// The signal, by name or number; 0 asks only whether there is a process
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
            "`{}` is no signal: write a name such as TERM or a number from 0 to 64",
            args.signal
        ))
    })?;
    lifecycle::signal(&args.id, &global.root()?, signal, args.all)?;
    Ok(0)
}

/// The highest signal of Linux on x86-64.
const LAST_SIGNAL: i32 = 64;

fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse() {
        return (0..=LAST_SIGNAL).contains(&number).then_some(number);
    }
    let name = text.to_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<Signal>().ok().map(|signal| signal as i32).or_else(|| real_time(&name))
}

/// The number of `SIGRTMIN+n` or `SIGRTMAX-n`; the first two of the kernel's are the C library's own.
fn real_time(name: &str) -> Option<i32> {
    const FIRST: i32 = 34;
    let count = |text: &str, sign: char| match text {
        "" => Some(0),
        _ => text.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let number = match (name.strip_prefix("SIGRTMIN"), name.strip_prefix("SIGRTMAX")) {
        (Some(up), _) => FIRST + count(up, '+')?,
        (_, Some(down)) => LAST_SIGNAL - count(down, '-')?,
        _ => return None,
    };
    (FIRST..=LAST_SIGNAL).contains(&number).then_some(number)
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
            ("SIGRTMIN+3", Some(37)),
            ("rtmax", Some(64)),
            ("RTMAX-14", Some(50)),
            ("RTMIN+31", None),
            ("RTMIN3", None),
            ("RTMAX+1", None),
            ("0", Some(0)),
            ("-1", None),
            ("65", None),
            ("-9", None),
            ("NOPE", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }
}
