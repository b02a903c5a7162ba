//! Reading a bundle.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Overrides, SpecError, capabilities, validate, walk};

/// The most bytes of a `config.json`: what a frame to the guest has room for, with space to spare for the
/// frame's own words.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// A bundle whose configuration is valid as far as the host can tell.
#[derive(Clone, Debug)]
pub struct Bundle {
    path: PathBuf,
    root: PathBuf,
    spec: Spec,
    user: Option<String>,
    warnings: Vec<String>,
}

impl Bundle {
    /// Reads the bundle at `path`, with the changes of the command line.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, SpecError> {
        let path = enter(path)?;
        let (mut spec, warnings) = parse(&path.join("config.json"))?;
        overrides.apply(&mut spec)?;
        let root = validate::check(&spec, &path)?;
        Ok(Self { path, root, spec, user: overrides.user.clone(), warnings })
    }

    /// The bundle's directory, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The root file system's directory, absolute and without symbolic links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The configuration, its paths still those of the host.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What of the configuration was left out.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// A user that replaces that of the configuration, to be looked up in the container's own files.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }
}

/// The configuration of a bundle that is in use.
pub fn spec_of(bundle: &Path) -> Result<Spec, SpecError> {
    parse(&bundle.join("config.json")).map(|(spec, _)| spec)
}

/// The process of a bundle's configuration, from which another one of the same container is made. The rest of the
/// configuration, which is of no interest now, is passed over.
pub fn process_of(bundle: &Path) -> Result<Process, SpecError> {
    #[derive(Deserialize)]
    struct Config {
        process: Option<Value>,
    }
    let config: Config = read_config(&bundle.join("config.json"))?;
    let process = config
        .process
        .ok_or_else(|| SpecError::Value { path: "process".into(), why: "it is missing".into() })?;
    understand_process(process).map(|(process, _)| process)
}

/// A process from a file of its own, as engines write it, and what of it was left out.
pub fn process_from(path: &Path) -> Result<(Process, Vec<String>), SpecError> {
    process_from_json_at(path, &read(path)?)
}

/// A process that an engine hands over without a file, and what of it was left out.
pub fn process_from_json(text: &[u8]) -> Result<(Process, Vec<String>), SpecError> {
    process_from_json_at(Path::new("process"), text)
}

fn process_from_json_at(path: &Path, text: &[u8]) -> Result<(Process, Vec<String>), SpecError> {
    let (process, warnings) = understand_process(from_json(path, text)?)?;
    validate::check_process(&process)?;
    Ok((process, warnings))
}

/// The process that a JSON value means, and what of it was left out.
fn understand_process(process: Value) -> Result<(Process, Vec<String>), SpecError> {
    let (spec, warnings) =
        understand(json!({"ociVersion": "1.0.0", "root": {"path": "rootfs"}, "process": process}))?;
    Ok((spec.process().clone().unwrap_or_default(), warnings))
}

/// Limits in the form of `linux.resources`, held against the table as those of a configuration are.
pub fn resources_of(limits: Value) -> Result<LinuxResources, SpecError> {
    const PATH: &str = "linux.resources";
    if !limits.is_object() {
        return Err(SpecError::Value { path: PATH.into(), why: "it is not a JSON object".into() });
    }
    walk::check_part(&limits, PATH)?;
    serde_path_to_error::deserialize(limits).map_err(|error| SpecError::Value {
        path: format!("{PATH}.{}", error.path()),
        why: error.into_inner().to_string(),
    })
}

fn enter(path: &Path) -> Result<PathBuf, SpecError> {
    let absolute = path.canonicalize().map_err(|error| SpecError::Bundle { path: path.into(), error })?;
    match absolute.is_dir() {
        true => Ok(absolute),
        false => Err(SpecError::BundleNotDirectory { path: path.into() }),
    }
}

fn parse(path: &Path) -> Result<(Spec, Vec<String>), SpecError> {
    understand(read_config(path)?)
}

/// A bundle's `config.json`, or what is wanted of it.
fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T, SpecError> {
    let text = read(path).map_err(|error| match error {
        SpecError::Config { error, .. } if error.kind() == io::ErrorKind::NotFound => {
            SpecError::NoConfig { path: path.parent().unwrap_or(path).into() }
        }
        error => error,
    })?;
    from_json(path, &text)
}

fn from_json<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, SpecError> {
    serde_json::from_slice(text).map_err(|error| SpecError::Json { path: path.into(), error })
}

/// The configuration that a JSON value means, and what of it was left out.
fn understand(mut config: Value) -> Result<(Spec, Vec<String>), SpecError> {
    check_version(&config)?;
    walk::check(&config)?;
    let warnings = config.get_mut("process").map(capabilities::leave_out_unknown).unwrap_or_default();
    // The specification lets the user be left out; the types that follow do not.
    if let Some(process) = config.get_mut("process").and_then(Value::as_object_mut) {
        process.get_mut("scheduler").and_then(|scheduler| scheduler.get_mut("flags")).map(respell_flags);
        process.entry("user").or_insert_with(|| json!({"uid": 0, "gid": 0}));
    }
    let spec = serde_path_to_error::deserialize(config).map_err(|error| SpecError::Value {
        path: error.path().to_string(),
        why: error.into_inner().to_string(),
    })?;
    Ok((spec, warnings))
}

/// The specification's names of the scheduler's flags that the types that follow have under others.
const FLAGS: [(&str, &str); 2] = [
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

fn respell_flags(flags: &mut Value) {
    for flag in flags.as_array_mut().into_iter().flatten() {
        if let Some((_, other)) = FLAGS.iter().find(|(name, _)| flag == name) {
            *flag = (*other).into();
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SpecError> {
    let error = |error| SpecError::Config { path: path.into(), error };
    let file = File::open(path).map_err(error)?;
    let mut text = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(error)?;
    match text.len() as u64 > MAX_CONFIG_BYTES {
        true => Err(SpecError::TooLarge { path: path.into(), max: MAX_CONFIG_BYTES }),
        false => Ok(text),
    }
}

fn check_version(config: &Value) -> Result<(), SpecError> {
    if !config.is_object() {
        return Err(SpecError::Value {
            path: ".".into(),
            why: "the configuration is not a JSON object".into(),
        });
    }
    let version = match config.get("ociVersion") {
        Some(Value::String(version)) => version,
        Some(other) => return Err(SpecError::Version { version: other.to_string() }),
        None => return Err(SpecError::Value { path: "ociVersion".into(), why: "it is missing".into() }),
    };
    match version.starts_with("1.") {
        true => Ok(()),
        false => Err(SpecError::Version { version: version.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn load(config: &str) -> Result<Bundle, String> {
        let bundle = tempfile::tempdir().unwrap();
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        fs::write(bundle.path().join("config.json"), config).unwrap();
        Bundle::load(bundle.path(), &Overrides::default()).map_err(|e| e.to_string())
    }

    const GOOD: &str = r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["true"]}}"#;

    #[test]
    fn a_small_configuration_is_enough() {
        let bundle = load(GOOD).unwrap();
        assert!(bundle.root().ends_with("rootfs"));
        assert_eq!(bundle.spec().process().as_ref().unwrap().user().uid(), 0);
    }

    #[test]
    fn flags_of_the_scheduler_have_the_names_of_the_specification() {
        let config = r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"cwd": "/", "args": ["a"],
            "scheduler": {"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN",
            "SCHED_FLAG_RECLAIM"]}}}"#;
        let bundle = load(config).unwrap();
        let scheduler = bundle.spec().process().as_ref().unwrap().scheduler().clone().unwrap();
        use oci_spec::runtime::LinuxSchedulerFlag::{SchedFlagDLOverrun, SchedFlagReclaim, SchedResetOnFork};
        let expected = [SchedResetOnFork, SchedFlagDLOverrun, SchedFlagReclaim];
        assert_eq!(scheduler.flags().as_deref(), Some(&expected[..]));
    }

    #[test]
    fn capabilities_that_nobody_knows_are_left_out_and_told() {
        let config = r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"cwd": "/", "args": ["a"],
            "capabilities": {"bounding": ["CAP_KILL", "CAP_FROB"]}}}"#;
        let bundle = load(config).unwrap();
        let sets = bundle.spec().process().as_ref().unwrap().capabilities().clone().unwrap();
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 1);
        assert!(bundle.warnings()[0].contains("bounding: \"CAP_FROB\""), "{:?}", bundle.warnings());
    }

    #[test]
    fn of_a_configuration_only_the_process_is_read_where_only_that_is_wanted() {
        let bundle = tempfile::tempdir().unwrap();
        let process = |config: &str| {
            fs::write(bundle.path().join("config.json"), config).unwrap();
            process_of(bundle.path()).map_err(|e| e.to_string())
        };
        let found =
            process(r#"{"bogus": [1], "process": {"cwd": "/there", "args": ["a"]}, "mounts": 7}"#).unwrap();
        assert_eq!((found.cwd().as_path(), found.user().uid()), (Path::new("/there"), 0));
        for (config, wanted) in [
            ("{}", "`process`: it is missing"),
            (r#"{"process": {"cwd": "/", "bogus": 1}}"#, "`process.bogus`"),
            (r#"{"process": {"cwd": 7}}"#, "`process.cwd`"),
            ("{\n  \"process\": ,\n}", "line 2 column 14"),
            (r#"{"process": {"cwd": "/"}} and more"#, "trailing characters"),
        ] {
            let message = process(config).unwrap_err();
            assert!(message.contains(wanted), "{config}: {message}");
        }
        fs::remove_file(bundle.path().join("config.json")).unwrap();
        assert!(process_of(bundle.path()).unwrap_err().to_string().contains("has no config.json"));
    }

    #[test]
    fn bad_bundles_have_their_own_errors() {
        let none = Overrides::default();
        let message = |path: &Path| Bundle::load(path, &none).unwrap_err().to_string();
        let dir = tempfile::tempdir().unwrap();
        assert!(message(&dir.path().join("missing")).contains("No such file"));
        assert!(message(dir.path()).contains("has no config.json"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(message(&dir.path().join("file")).contains("is not a directory"));
        fs::write(dir.path().join("config.json"), vec![b' '; MAX_CONFIG_BYTES as usize + 1]).unwrap();
        assert!(message(dir.path()).contains("is larger than"));
    }

    #[test]
    fn bad_configurations_say_where() {
        for (config, wanted) in [
            ("{\n  \"ociVersion\": ,\n}", "line 2 column 17"),
            ("[]", "not a JSON object"),
            ("{}", "`ociVersion`: it is missing"),
            (r#"{"ociVersion": "2.0.0"}"#, "`2.0.0` is not supported"),
            (r#"{"ociVersion": 1}"#, "`1` is not supported"),
            (
                r#"{"ociVersion": "1.0.2", "process": {"cwd": "/", "args": "sh"}}"#,
                "`process.args`: invalid type",
            ),
            (r#"{"ociVersion": "1.0.2", "process": {"args": ["sh"]}}"#, "missing field `cwd`"),
            (
                r#"{"ociVersion": "1.0.2", "process": {"cwd": "/", "capabilities": {"bounding": [7]}}}"#,
                "bounding",
            ),
        ] {
            let message = load(config).unwrap_err();
            assert!(message.contains(wanted), "{config}: {message}");
        }
    }
}
