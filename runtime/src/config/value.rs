//! The values of keys, checked where they are read, so that an error has their place.

use std::path::PathBuf;
use std::time::Duration;

use sandbox_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};
use serde::Deserialize;

use crate::quantity::{Size, Span};
use crate::spec::ANNOTATIONS;

/// The least overhead of memory with which a guest boots, in MiB.
const MIN_OVERHEAD_MIB: u32 = 32;

/// The memory of a machine, in MiB.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct MachineMemory(pub u32);

/// What a machine has besides the limits of its containers, in MiB.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Overhead(pub u32);

/// How long something may take.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Timeout(pub Duration);

/// A number of vCPUs.
#[derive(Debug, Deserialize)]
#[serde(try_from = "u64")]
pub struct Vcpus(pub u8);

/// A path that means the same wherever a program was started.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct AbsolutePath(pub PathBuf);

/// The name of an annotation that this runtime knows.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Allowed(pub String);

impl TryFrom<String> for MachineMemory {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        mib(&text, MIN_MEMORY_MIB).map(Self)
    }
}

impl TryFrom<String> for Overhead {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        mib(&text, MIN_OVERHEAD_MIB).map(Self)
    }
}

impl TryFrom<String> for Timeout {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(|span: Span| Self(span.0)).map_err(|error| error.to_string())
    }
}

impl TryFrom<u64> for Vcpus {
    type Error = String;

    fn try_from(number: u64) -> Result<Self, String> {
        let vcpus = u8::try_from(number).ok().filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus));
        vcpus.map(Self).ok_or_else(|| format!("from 1 to {MAX_VCPUS} vCPUs are possible, not {number}"))
    }
}

impl TryFrom<String> for AbsolutePath {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let path = PathBuf::from(&text);
        path.is_absolute().then_some(Self(path)).ok_or_else(|| format!("`{text}` is not an absolute path"))
    }
}

impl TryFrom<String> for Allowed {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match ANNOTATIONS.contains(&text.as_str()) {
            true => Ok(Self(text)),
            false => {
                Err(format!("`{text}` is no annotation of this runtime: it knows {}", ANNOTATIONS.join(", ")))
            }
        }
    }
}

fn mib(text: &str, least: u32) -> Result<u32, String> {
    let size: Size = text.parse().map_err(|error: crate::quantity::QuantityError| error.to_string())?;
    let mib =
        u32::try_from(size.0.div_ceil(1 << 20)).ok().filter(|mib| (least..=MAX_MEMORY_MIB).contains(mib));
    mib.ok_or_else(|| format!("from {least} MiB to {MAX_MEMORY_MIB} MiB are possible, not `{text}`"))
}
