//! What containerd may say about a container besides its bundle: the options of the runtime.
//!
//! There are two: who makes the cgroups of the host, and another configuration than the host's. They come in two forms:
//! in that of runc's options, which clients send to any runtime when a flag of theirs concerns it; and in that of
//! runtimes that containerd knows nothing of, which is a path, or what containerd's own configuration has in the
//! section `options` of the handler, as it stands there.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, UnknownValueRef};
use containerd_shim_protos::shim::oci::Options as Runc;
use sandbox_runtime::cgroup::Manager;
use sandbox_runtime::config::{Config, ConfigError};
use sandbox_runtime::lifecycle::Place;
use serde::Deserialize;

/// The options of runc.
const RUNC: &str = "containerd.runc.v1.Options";

/// The options of runtimes that containerd knows nothing of.
const GENERIC: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// The fields of [`GENERIC`]: `config_path` and `config_body`. The first is the name of a type.
const CONFIG_PATH: u32 = 2;
const CONFIG_BODY: u32 = 3;

/// Why options are not taken.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Another runtime's.
    #[error("the runtime options {0:?} are not those of this runtime: leave them out")]
    Unknown(String),
    /// An option that asks for something else.
    #[error("the runtime option {0:?} is not supported: leave it out")]
    Unsupported(&'static str),
    /// They cannot be read.
    #[error("the runtime options {0:?} cannot be read")]
    Damaged(String),
    /// The section of containerd's configuration says something else.
    #[error(
        "the section `options` of the runtime's handler in containerd's configuration: {0} (there are SystemdCgroup \
         and ConfigPath)"
    )]
    Section(String),
    /// The file is not named from the top.
    #[error("the runtime option \"ConfigPath\": {} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// The state of containers is where the shim was told that it is.
    #[error("the runtime option \"ConfigPath\": {}: `state.root` cannot be set for one handler alone: leave it out", .0.display())]
    Root(PathBuf),
    /// The file is no configuration.
    #[error("the runtime option \"ConfigPath\": {0}")]
    Config(#[from] ConfigError),
}

/// The options of a container.
#[derive(Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Whether systemd makes the cgroups of the host.
    #[serde(rename = "SystemdCgroup")]
    systemd_cgroup: bool,
    /// The configuration that holds instead of the host's.
    #[serde(rename = "ConfigPath")]
    config_path: Option<PathBuf>,
}

impl Options {
    /// Those that came with a container.
    pub fn of(options: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(options) = options else { return Ok(Self::default()) };
        let damaged = || OptionsError::Damaged(options.type_url.clone());
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        match name {
            "" => Ok(Self::default()),
            RUNC => Self::of_runc(&Runc::parse_from_bytes(&options.value).map_err(|_| damaged())?),
            name if GENERIC.contains(&name) => Self::generic(&options.value, damaged),
            _ => Err(OptionsError::Unknown(options.type_url.clone())),
        }
    }

    /// What concerns the host's side of runc, such as its keyring, has no counterpart here and no effect.
    fn of_runc(options: &Runc) -> Result<Self, OptionsError> {
        for (name, value) in [
            ("BinaryName", &options.binary_name),
            ("Root", &options.root),
            ("ShimCgroup", &options.shim_cgroup),
            ("CriuImagePath", &options.criu_image_path),
            ("CriuWorkPath", &options.criu_work_path),
        ] {
            if !value.is_empty() {
                return Err(OptionsError::Unsupported(name));
            }
        }
        Ok(Self { systemd_cgroup: options.systemd_cgroup, config_path: None })
    }

    fn generic(value: &[u8], damaged: impl Fn() -> OptionsError) -> Result<Self, OptionsError> {
        let fields = Empty::parse_from_bytes(value).map_err(|_| damaged())?;
        let text = |field: u32| {
            let found = fields.special_fields.unknown_fields().get(field);
            match found {
                None => Ok(String::new()),
                Some(UnknownValueRef::LengthDelimited(bytes)) => {
                    String::from_utf8(bytes.to_vec()).map_err(|_| damaged())
                }
                Some(_) => Err(damaged()),
            }
        };
        let body = text(CONFIG_BODY)?;
        let mut options: Self =
            toml::from_str(&body).map_err(|error| OptionsError::Section(error.message().to_owned()))?;
        let path = text(CONFIG_PATH)?;
        if !path.is_empty() {
            options.config_path = Some(path.into());
        }
        Ok(options)
    }

    /// The place of a container with these options.
    pub fn place(&self, place: &Place) -> Result<Place, OptionsError> {
        let mut place = place.clone();
        if self.systemd_cgroup {
            place.cgroups = Manager::Systemd;
        }
        if let Some(path) = &self.config_path {
            place.config = config(path)?;
        }
        Ok(place)
    }
}

fn config(path: &Path) -> Result<Config, OptionsError> {
    if !path.is_absolute() {
        return Err(OptionsError::Relative(path.into()));
    }
    let config = Config::load(Some(path))?;
    match config.root {
        Some(_) => Err(OptionsError::Root(path.into())),
        None => Ok(config),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(name: &str, value: Vec<u8>) -> Any {
        Any { type_url: name.into(), value, ..Any::default() }
    }

    fn generic(path: &str, body: &str) -> Any {
        let mut fields = Empty::default();
        let unknown = fields.special_fields.mut_unknown_fields();
        unknown.add_length_delimited(1, b"a.type".to_vec());
        unknown.add_length_delimited(CONFIG_PATH, path.into());
        unknown.add_length_delimited(CONFIG_BODY, body.into());
        any("runtimeoptions.v1.Options", fields.write_to_bytes().unwrap())
    }

    fn systemd() -> Any {
        let options = Runc { systemd_cgroup: true, ..Runc::default() };
        any("types.containerd.io/containerd.runc.v1.Options", options.write_to_bytes().unwrap())
    }

    #[test]
    fn options_in_both_forms() {
        let pivot = Runc { no_pivot_root: true, ..Runc::default() };
        let of = |systemd_cgroup, path: Option<&str>| Options {
            systemd_cgroup,
            config_path: path.map(Into::into),
        };
        for (given, wanted) in [
            (None, of(false, None)),
            (Some(any("", vec![])), of(false, None)),
            (Some(any(RUNC, vec![])), of(false, None)),
            (Some(any(RUNC, pivot.write_to_bytes().unwrap())), of(false, None)),
            (Some(systemd()), of(true, None)),
            (Some(any("runtimeoptions.v1.Options", vec![])), of(false, None)),
            (Some(generic("/a/file", "")), of(false, Some("/a/file"))),
            (Some(generic("", "SystemdCgroup = true\n")), of(true, None)),
            (Some(generic("", "ConfigPath = '/b'\nSystemdCgroup = false\n")), of(false, Some("/b"))),
        ] {
            assert_eq!(Options::of(given.as_ref()).unwrap(), wanted, "{given:?}");
        }
    }

    #[test]
    fn others_are_refused_by_their_name() {
        let root = Runc { root: "/other".into(), ..Runc::default() };
        let cases = [
            (any(RUNC, root.write_to_bytes().unwrap()), "\"Root\""),
            (any(RUNC, vec![0xff]), "cannot be read"),
            (any("runtimeoptions.v1.Options", vec![0xff]), "cannot be read"),
            (generic("", "BinaryName = 'crun'"), "BinaryName"),
            (generic("", "SystemdCgroup = 1"), "SystemdCgroup"),
            (any("io.example.Options", vec![]), "io.example.Options"),
        ];
        for (options, word) in cases {
            let message = Options::of(Some(&options)).unwrap_err().to_string();
            assert!(message.contains(word), "{word}: {message}");
        }
    }

    #[test]
    fn a_configuration_of_its_own_holds_instead_of_the_host_s() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("other.toml");
        let base = crate::place::of("default", false).unwrap();
        let place = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Options { systemd_cgroup: true, config_path: Some(file.clone()) }.place(&base)
        };
        let placed = place("[annotations]\nallowed = ['dev.sandbox.memory']\n").unwrap();
        assert_eq!((placed.cgroups, placed.root.clone()), (Manager::Systemd, base.root.clone()));
        assert_eq!(placed.config.annotations.len(), 1);
        let word = |error: OptionsError| error.to_string();
        assert!(
            word(place("state.root = '/elsewhere'\n").unwrap_err()).contains("`state.root` cannot be set")
        );
        assert!(word(place("nonsense = 1\n").unwrap_err()).contains("other.toml:1"));
        let relative = Options { systemd_cgroup: false, config_path: Some("a".into()) };
        assert!(word(relative.place(&base).unwrap_err()).contains("not an absolute path"));
    }
}
