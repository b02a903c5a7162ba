//! From words to a [`Cli`].
//!
//! clap copies the global arguments into every command that it is told of, which takes longer than what most commands
//! do. So it is told of the one alone that is named, and of all of them where that does not explain the line: for help,
//! for errors, and where the name was the value of an option.

use std::ffi::OsString;

use clap::{Args, FromArgMatches, Parser, Subcommand};

use super::{Cli, Command, Options};

/// Parses a command line, whose first word is the program.
pub fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    at_once(args).map_or_else(|| Cli::try_parse_from(args), Ok)
}

/// Parses one that is well-formed with no other command than the first that a word of it names, if one does.
fn at_once(args: &[OsString]) -> Option<Cli> {
    let all = Command::augment_subcommands(clap::Command::default());
    let named = args.iter().skip(1).find_map(|word| all.find_subcommand(word)).cloned();
    let options = Options::augment_args(clap::Command::default());
    let matches = options.subcommands(named).try_get_matches_from(args).ok()?;
    Cli::from_arg_matches(&matches).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Cli, clap::Error> {
        parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn a_name_that_is_a_value_is_no_command() {
        let cli = parsed("sandbox --root exec list").unwrap();
        assert!(matches!(cli.command, Some(Command::List(_))), "{:?}", cli.command);
        let cli = parsed("sandbox --root exec state list").unwrap();
        assert!(matches!(cli.command, Some(Command::State(_))), "{:?}", cli.command);
    }

    #[test]
    fn no_command_is_no_error_yet() {
        assert!(parsed("sandbox --version").is_ok_and(|cli| cli.options.version && cli.command.is_none()));
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let cli = parsed("sandbox list --root elsewhere --debug").unwrap();
        assert_eq!(cli.options.global.root, Some("elsewhere".into()));
        assert!(cli.options.global.debug);
    }

    #[test]
    fn help_and_errors_know_every_command() {
        let help = parsed("sandbox --root run --help").unwrap_err().to_string();
        assert!(help.contains("  exec ") && help.contains("  list "), "{help}");
        let error = parsed("sandbox --root run exe").unwrap_err().to_string();
        assert!(error.contains("'exec'"), "{error}");
    }
    #[test]
    fn the_help_of_a_command_begins_with_what_it_does() {
        for (command, does) in [
            ("exec", "Run one more process in a running sandbox"),
            ("create", "Make a sandbox whose process waits to be started"),
            ("run", "Run a bundle and wait for its end"),
        ] {
            let help = parsed(&format!("sandbox {command} --help")).unwrap_err().to_string();
            assert!(help.starts_with(&format!("{does}\n")), "{help}");
        }
    }
}
