//! The annotations of this runtime, by which whoever writes a configuration, such as the author of a pod, asks for
//! something that is the operator's to grant.
//!
//! One that the operator has not allowed is refused, and so is one that does not exist: both would be a wish that
//! nobody hears.

use oci_spec::runtime::Spec;
use sandbox_protocol::RootWrites;
use sandbox_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

use super::{SpecError, rates};
use crate::quantity::Size;

/// How they all begin.
const PREFIX: &str = "dev.sandbox.";

/// The memory of the machine.
const MEMORY: &str = "dev.sandbox.memory";

/// Where writes to the root file system go.
const ROOT_WRITES: &str = "dev.sandbox.root-writes";

/// The vCPUs of the machine.
const VCPUS: &str = "dev.sandbox.vcpus";

/// All that there are.
pub const ANNOTATIONS: [&str; 3] = [MEMORY, ROOT_WRITES, VCPUS];

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Asked {
    /// The memory of the machine, in MiB, whatever the limits of its containers.
    pub memory_mib: Option<u32>,
    /// The vCPUs of the machine.
    pub vcpus: Option<u8>,
    /// Where writes to the root file system go.
    pub root_writes: Option<RootWrites>,
}

impl Asked {
    /// What a configuration asks for, of what the operator allows.
    pub fn of(spec: &Spec, allowed: &[String]) -> Result<Self, SpecError> {
        let mut asked = Self::default();
        let all = spec.annotations().iter().flatten();
        // Limits bound what the asker itself may do, which nobody has to grant: see `super::rates_of`.
        let ours = |name: &str| name.starts_with(PREFIX) && !name.starts_with(rates::PREFIX);
        for (name, value) in all.filter(|(name, _)| ours(name)) {
            let path = || format!("annotations.{name}");
            if !ANNOTATIONS.contains(&name.as_str()) {
                let reason = format!("this runtime knows {}", ANNOTATIONS.join(", "));
                return Err(SpecError::Unsupported { path: path(), reason });
            }
            if !allowed.contains(name) {
                let reason =
                    "the operator of this host does not allow it: leave it out, or have it added to \
                              annotations.allowed in /etc/sandbox/config.toml"
                        .into();
                return Err(SpecError::Unsupported { path: path(), reason });
            }
            asked.take(name, value).map_err(|why| SpecError::Value { path: path(), why })?;
        }
        Ok(asked)
    }

    fn take(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            MEMORY => {
                let size: Size = value.parse().map_err(|e: crate::quantity::QuantityError| e.to_string())?;
                let mib = u32::try_from(size.0.div_ceil(1 << 20)).ok();
                let mib = mib.filter(|mib| (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(mib));
                self.memory_mib = Some(mib.ok_or_else(|| {
                    format!("a machine has from {MIN_MEMORY_MIB} MiB to {MAX_MEMORY_MIB} MiB, not `{value}`")
                })?);
            }
            VCPUS => {
                let vcpus = value.parse().ok().filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus));
                let why = || format!("a machine has from 1 to {MAX_VCPUS} vCPUs, not `{value}`");
                self.vcpus = Some(vcpus.ok_or_else(why)?);
            }
            _ => {
                self.root_writes = Some(match value {
                    "through" => RootWrites::Through,
                    "overlay" => RootWrites::Overlay,
                    _ => return Err(format!("`{value}` is neither `through` nor `overlay`")),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(name: &str, value: &str, allowed: &[&str]) -> Result<Asked, String> {
        let spec = json!({"ociVersion": "1.2.0", "annotations": {name: value, "other": "x"}});
        let allowed: Vec<String> = allowed.iter().map(|&name| name.to_owned()).collect();
        Asked::of(&serde_json::from_value(spec).unwrap(), &allowed).map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_operator_allows_is_honoured() {
        let memory = Asked { memory_mib: Some(256), ..Asked::default() };
        assert_eq!(asked(MEMORY, "256M", &ANNOTATIONS), Ok(memory));
        assert_eq!(asked(VCPUS, "3", &[VCPUS]), Ok(Asked { vcpus: Some(3), ..Asked::default() }));
        let overlay = Asked { root_writes: Some(RootWrites::Overlay), ..Asked::default() };
        assert_eq!(asked(ROOT_WRITES, "overlay", &ANNOTATIONS), Ok(overlay));
        assert_eq!(asked("dev.sandbox.rate.files", "bytes=1M", &[]), Ok(Asked::default()));
        assert_eq!(asked("io.kubernetes.cri.sandbox-id", "a", &[]), Ok(Asked::default()));
    }

    #[test]
    fn the_rest_is_refused_by_its_name() {
        for (name, value, allowed, wanted) in [
            (MEMORY, "256M", &[VCPUS][..], "the operator of this host does not allow it"),
            ("dev.sandbox.kernel", "/tmp/x", &ANNOTATIONS, "this runtime knows dev.sandbox.memory"),
            (MEMORY, "1M", &ANNOTATIONS, "a machine has from 48 MiB"),
            (MEMORY, "much", &ANNOTATIONS, "size `much` is not understood"),
            (VCPUS, "0", &ANNOTATIONS, "a machine has from 1 to 254"),
            (ROOT_WRITES, "away", &ANNOTATIONS, "neither `through` nor `overlay`"),
        ] {
            let error = asked(name, value, allowed).unwrap_err();
            assert!(error.contains(&format!("annotations.{name}")) && error.contains(wanted), "{error}");
        }
    }
}
