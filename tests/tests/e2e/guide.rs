//! The guide's `console` blocks do what the guide says.

use std::path::Path;
use std::process::Command;

use sandbox_tests::bundle::Bundle;
use sandbox_tests::place::{SEARCH_PATH, binary};
use sandbox_tests::process::Process;

const GUIDE: &str = include_str!("../../../docs/guide.md");

/// A command of the guide, and what it is to print.
#[derive(Debug, PartialEq)]
struct Example {
    command: String,
    output: String,
}

#[test]
fn every_example_prints_what_it_says() {
    let examples = examples(GUIDE);
    assert!(examples.len() > 10, "the guide has lost its examples: {examples:?}");
    let directory = tempfile::tempdir().expect("a temporary directory");
    Bundle::make(&directory.path().join("bundle"));
    for example in examples {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &example.command]).current_dir(directory.path()).env("PATH", path());
        Process::spawn(&mut shell).wait().expect_stdout(&example.output);
    }
}

#[test]
fn examples_are_read_as_they_are_meant() {
    let page = "```console\n$ a\nb\nc\n$ d\n```\n$ not one\n```sh\n$ nor this\n```\n";
    let example = |command: &str, output: &str| Example { command: command.into(), output: output.into() };
    assert_eq!(examples(page), [example("a", "b\nc\n"), example("d", "")]);
}

/// The shipped `sandbox` first.
fn path() -> String {
    let binaries = binary("sandbox").parent().map(Path::to_owned).unwrap_or_default();
    format!("{}:{SEARCH_PATH}", binaries.display())
}

fn examples(page: &str) -> Vec<Example> {
    let mut found: Vec<Example> = vec![];
    let mut inside = false;
    for line in page.lines() {
        match (inside, line.strip_prefix("$ ")) {
            (false, _) => inside = line == "```console",
            (true, _) if line == "```" => inside = false,
            (true, Some(command)) => found.push(Example { command: command.into(), output: String::new() }),
            (true, None) => {
                let example = found.last_mut().expect("output follows a command");
                example.output.push_str(line);
                example.output.push('\n');
            }
        }
    }
    found
}
