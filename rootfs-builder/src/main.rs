//! Packs the agent into the guest image: `rootfs-builder --agent PATH --output PATH`.
//!
//! The image is an uncompressed initramfs with the agent as `/init`. The same agent gives the same bytes,
//! whoever packs it, where and when.

#![forbid(unsafe_code)]

mod agent;
mod archive;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

/// Packs the agent into the guest image.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The agent: a static x86-64 ELF program.
    #[arg(long)]
    agent: PathBuf,
    /// The image to make.
    #[arg(long)]
    output: PathBuf,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot read the agent {path}: {source}")]
    ReadAgent { path: PathBuf, source: io::Error },
    #[error("cannot use the agent {path}: {source}")]
    UnusableAgent { path: PathBuf, source: agent::Unusable },
    #[error("cannot pack the image: {0}")]
    Pack(#[from] io::Error),
    #[error("cannot write the image {path}: {source}")]
    WriteImage { path: PathBuf, source: io::Error },
}

fn main() -> ExitCode {
    match build(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rootfs-builder: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(arguments: &Arguments) -> Result<(), Error> {
    let path = &arguments.agent;
    let program = fs::read(path).map_err(|source| Error::ReadAgent { path: path.clone(), source })?;
    agent::check(&program).map_err(|source| Error::UnusableAgent { path: path.clone(), source })?;
    let image = archive::pack(&program)?;
    replace(&arguments.output, &image)
        .map_err(|source| Error::WriteImage { path: arguments.output.clone(), source })
}

/// Writes `image` beside `output` and renames it, so that nobody ever sees half an image.
fn replace(output: &Path, image: &[u8]) -> io::Result<()> {
    let mut new = output.as_os_str().to_owned();
    new.push(".new");
    fs::write(&new, image)?;
    fs::rename(&new, output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build_in(directory: &Path, program: &[u8]) -> Result<Vec<u8>, Error> {
        let arguments = Arguments { agent: directory.join("agent"), output: directory.join("image") };
        fs::write(&arguments.agent, program).unwrap();
        build(&arguments)?;
        Ok(fs::read(&arguments.output).unwrap())
    }

    #[test]
    fn the_same_agent_gives_the_same_bytes() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let program = agent::tests::static_program();
        assert_eq!(build_in(first.path(), &program).unwrap(), build_in(second.path(), &program).unwrap());
    }

    #[test]
    fn nothing_but_the_image_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        build_in(directory.path(), &agent::tests::static_program()).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["agent", "image"]);
    }

    #[test]
    fn a_missing_agent_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let arguments =
            Arguments { agent: directory.path().join("nowhere"), output: directory.path().join("image") };
        let message = build(&arguments).unwrap_err().to_string();
        assert!(message.contains("nowhere: No such file"), "{message}");
    }

    #[test]
    fn a_script_is_refused_and_makes_no_image() {
        let directory = tempfile::tempdir().unwrap();
        let message = build_in(directory.path(), b"#!/bin/sh\n").unwrap_err().to_string();
        assert!(message.ends_with("it is not an ELF program"), "{message}");
        assert!(!directory.path().join("image").exists());
    }
}
