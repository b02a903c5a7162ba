//! The operator's configuration: what holds for every sandbox of a host unless a command line or the environment says
//! otherwise.
//!
//! It is `/etc/sandbox/config.toml`, which need not exist, or the file that `--config` or `SANDBOX_CONFIG` names, which
//! has to; then, in the order of their names, the files `*.toml` of the directory beside it that has its name and `.d`.
//! A later file changes the keys that it has. Each key is described in `docs/configuration.md`; one that does not exist,
//! or a value that cannot be, is an error with its file and line.

mod file;
mod value;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sandbox_vmm_api::MachineChoice;

use crate::sandbox::Times;
use crate::spec::MachineSizes;

/// Where the configuration is unless somebody names another file.
const PATH: &str = "/etc/sandbox/config.toml";

/// The environment variable that names it, for programs that have no `--config`.
pub const VARIABLE: &str = "SANDBOX_CONFIG";

/// The most bytes of a file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What the operator wants.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// The machine.
    pub machine: Machine,
    /// The state root.
    pub root: Option<PathBuf>,
    /// The annotations that are honoured.
    pub annotations: Vec<String>,
    /// Where starts are counted, if they are.
    pub metrics: Option<PathBuf>,
    /// The files that say so.
    pub files: Vec<PathBuf>,
}

/// What the operator wants of machines.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Machine {
    /// Which one.
    pub choice: MachineChoice,
    /// The guest kernel, the guest image and `sandbox-vmm`, where they are not looked for.
    pub kernel: Option<PathBuf>,
    /// The guest image.
    pub image: Option<PathBuf>,
    /// The program.
    pub vmm: Option<PathBuf>,
    /// How long a guest may take to boot, and to answer each request.
    pub boot_timeout: Duration,
    /// How large it is.
    pub sizes: MachineSizes,
}

impl Default for Config {
    fn default() -> Self {
        let machine = Machine {
            choice: MachineChoice::Auto,
            kernel: None,
            image: None,
            vmm: None,
            boot_timeout: Times::DEFAULT_ANSWER,
            sizes: MachineSizes::default(),
        };
        Self { machine, root: None, annotations: Vec::new(), metrics: None, files: Vec::new() }
    }
}

/// Why the configuration cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read the configuration {}: {error}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file says something that cannot be.
    #[error("{}:{line}:{column}: {why}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// Where in the line, from 1.
        column: usize,
        /// What is wrong.
        why: String,
    },
}

impl Config {
    /// The configuration: the one that is named, by a flag or else by the environment, or the host's.
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigError> {
        let named = named.map(PathBuf::from).or_else(|| std::env::var_os(VARIABLE).map(PathBuf::from));
        match named {
            Some(path) => Self::of(&path, true),
            None => Self::of(Path::new(PATH), false),
        }
    }

    fn of(path: &Path, has_to_be: bool) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        match read(path) {
            Err(ConfigError::Read { error, .. }) if error.kind() == io::ErrorKind::NotFound && !has_to_be => {
            }
            text => config.take(path, &text?)?,
        }
        for path in drop_ins(path)? {
            config.take(&path, &read(&path)?)?;
        }
        Ok(config)
    }

    /// Changes what a file has.
    fn take(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        file::File::parse(path, text)?.apply(self);
        self.files.push(path.into());
        Ok(())
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let read = || {
        if fs::metadata(path)?.len() > MAX_FILE_BYTES {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        fs::read_to_string(path)
    };
    read().map_err(|error| ConfigError::Read { path: path.into(), error })
}

/// The files besides, in the order in which they are taken.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut directory = path.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let error = |error| ConfigError::Read { path: directory.clone(), error };
    let entries = match fs::read_dir(&directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(error)?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>();
    let mut paths = paths.map_err(error)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration and its drop-ins.
    fn load(files: &[(&str, &str)]) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("c.toml.d")).unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let error =
            |error: ConfigError| error.to_string().replace(&format!("{}/", directory.path().display()), "");
        Config::of(&directory.path().join("c.toml"), true).map_err(error)
    }

    #[test]
    fn later_files_change_what_they_have() {
        let config = load(&[
            ("c.toml", "[machine]\nkind = \"kvm\"\nvcpus = 2\nmemory = \"1G\""),
            ("c.toml.d/20.toml", "[machine]\nvcpus = 4"),
            ("c.toml.d/10.toml", "machine.vcpus = 3\nannotations.allowed = [\"dev.sandbox.vcpus\"]"),
            ("c.toml.d/README", "no TOML"),
        ])
        .unwrap();
        let sizes = MachineSizes { memory_mib: 1024, vcpus: 4, ..MachineSizes::default() };
        assert_eq!((config.machine.choice, config.machine.sizes), (MachineChoice::Kvm, sizes));
        assert_eq!(config.annotations, ["dev.sandbox.vcpus"]);
        assert_eq!(config.files.len(), 3);
    }

    #[test]
    fn what_cannot_be_is_named_with_its_place() {
        for (text, wanted) in [
            ("a = 1", "c.toml:1:1: unknown field `a`"),
            ("[machine]\n\n  vcpu = 1", "c.toml:3:3: unknown field `vcpu`"),
            ("[machine]\nvcpus = 0", "c.toml:2:9: from 1 to 254"),
            ("[machine]\nvcpus = \"two\"", "c.toml:2:9: invalid type: string \"two\""),
            ("machine.memory = \"much\"", "c.toml:1:18: size `much` is not understood"),
            ("machine.memory = \"1M\"", "c.toml:1:18: from 48 MiB to 1048576 MiB"),
            ("machine.memory_overhead = \"1M\"", "c.toml:1:27: from 32 MiB to 1048576 MiB"),
            ("machine.kind = \"xen\"", "c.toml:1:16: unknown variant `xen`"),
            ("machine.kernel = \"vmlinux\"", "c.toml:1:18: `vmlinux` is not an absolute path"),
            ("machine.boot_timeout = \"soon\"", "c.toml:1:24: duration `soon` is not understood"),
            ("annotations.allowed = [\"a\"]", "c.toml:1:23: `a` is no annotation of this runtime"),
            ("[machine\n", "c.toml:1:9: "),
        ] {
            let error = load(&[("c.toml", text)]).unwrap_err();
            assert!(error.starts_with(wanted), "{text}: {error}");
        }
        assert!(load(&[]).unwrap_err().starts_with("cannot read the configuration c.toml: No such file"));
        let error = load(&[("c.toml", ""), ("c.toml.d/a.toml", "b = 1")]).unwrap_err();
        assert!(error.starts_with("c.toml.d/a.toml:1:1: unknown field"), "{error}");
    }

    #[test]
    fn a_host_without_one_has_the_defaults() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Config::of(&directory.path().join("c.toml"), false).unwrap(), Config::default());
    }

    #[test]
    fn each_key_is_documented() {
        let page = include_str!("../../../docs/configuration.md");
        let documented: Vec<String> = page
            .lines()
            .filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned()))
            .filter(|key| key.contains('.') && !key.starts_with("dev."))
            .collect();
        let error = load(&[("c.toml", "nothing = 1")]).unwrap_err();
        let mut keys = Vec::new();
        for section in expected(&error) {
            let error = load(&[("c.toml", &format!("[{section}]\nnothing = 1"))]).unwrap_err();
            keys.extend(expected(&error).iter().map(|key| format!("{section}.{key}")));
        }
        assert_eq!(documented, keys);
        let example = page.split("```toml").nth(1).unwrap().split("```").next().unwrap();
        let config = load(&[("c.toml", example)]).unwrap();
        assert_eq!(Config { files: Vec::new(), ..config }, Config::default());
    }

    /// The keys that an error about an unknown one lists.
    fn expected(error: &str) -> Vec<String> {
        let list = error.split_once("expected ").unwrap().1;
        list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }
}
