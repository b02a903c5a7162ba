//! What containerd may say about a container besides its bundle: the options of the runtime. This one has none, so that
//! only those are taken that ask for nothing.

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;

/// The options of runc, which clients send to any runtime when a flag of theirs concerns it.
const RUNC: &str = "containerd.runc.v1.Options";

/// The options of runtimes that containerd knows nothing of: the path or the text of a configuration.
const GENERIC: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// Why options are not taken.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum OptionsError {
    /// Another runtime's.
    #[error("the runtime options {0:?} are not those of this runtime, which has none: leave them out")]
    Unknown(String),
    /// An option that asks for something.
    #[error("the runtime option {0:?} is not supported: leave it out{1}")]
    Unsupported(&'static str, &'static str),
    /// They cannot be read.
    #[error("the runtime options {0:?} cannot be read")]
    Damaged(String),
}

/// Looks at the options of a container.
pub fn check(options: Option<&Any>) -> Result<(), OptionsError> {
    let Some(options) = options else { return Ok(()) };
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    match name {
        "" => Ok(()),
        RUNC => {
            let options = Options::parse_from_bytes(&options.value)
                .map_err(|_| OptionsError::Damaged(options.type_url.clone()))?;
            check_runc(&options)
        }
        name if GENERIC.contains(&name) => match options.value.is_empty() {
            true => Ok(()),
            false => Err(OptionsError::Unsupported("ConfigPath", ": /etc/sandbox/config.toml configures it")),
        },
        _ => Err(OptionsError::Unknown(options.type_url.clone())),
    }
}

/// What concerns the host's side of runc, such as its keyring, has no counterpart here and no effect.
fn check_runc(options: &Options) -> Result<(), OptionsError> {
    for (name, value) in [
        ("BinaryName", &options.binary_name),
        ("Root", &options.root),
        ("ShimCgroup", &options.shim_cgroup),
        ("CriuImagePath", &options.criu_image_path),
        ("CriuWorkPath", &options.criu_work_path),
    ] {
        if !value.is_empty() {
            return Err(OptionsError::Unsupported(name, ""));
        }
    }
    match options.systemd_cgroup {
        true => Err(OptionsError::Unsupported("SystemdCgroup", ": cgroups are made without systemd")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(name: &str, value: Vec<u8>) -> Any {
        Any { type_url: name.into(), value, ..Any::default() }
    }

    #[test]
    fn options_that_ask_for_nothing_are_taken() {
        let pivot = Options { no_pivot_root: true, ..Options::default() };
        for good in [
            None,
            Some(any("", vec![])),
            Some(any(RUNC, vec![])),
            Some(any("types.containerd.io/containerd.runc.v1.Options", pivot.write_to_bytes().unwrap())),
            Some(any("runtimeoptions.v1.Options", vec![])),
        ] {
            assert_eq!(check(good.as_ref()), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn others_are_refused_by_their_name() {
        let systemd = Options { systemd_cgroup: true, ..Options::default() };
        let cases = [
            (any(RUNC, systemd.write_to_bytes().unwrap()), "SystemdCgroup"),
            (any(RUNC, vec![0xff]), "cannot be read"),
            (any("runtimeoptions.v1.Options", vec![1]), "ConfigPath"),
            (any("io.example.Options", vec![]), "io.example.Options"),
        ];
        for (options, word) in cases {
            assert!(check(Some(&options)).unwrap_err().to_string().contains(word), "{word}");
        }
    }
}
