//! What annotations say that the devices of a sandbox do at most.

use std::collections::HashMap;
use std::num::NonZeroU64;

use oci_spec::runtime::Spec;
use sandbox_vmm_api::{RateLimit, Rates};

use super::SpecError;
use crate::quantity::Size;

/// What the annotations begin with; the rest names the device.
pub(super) const PREFIX: &str = "dev.sandbox.rate.";

/// The limits of a sandbox's devices.
pub fn rates_of(spec: &Spec) -> Result<Rates, SpecError> {
    let mut rates = Rates::default();
    for (key, value) in annotations(spec) {
        let device = match key.strip_prefix(PREFIX) {
            Some("files") => &mut rates.share,
            Some("network") => &mut rates.nets,
            Some("streams") => &mut rates.vsock,
            Some(_) => return Err(wrong(key, "the devices are files, network and streams".into())),
            None => continue,
        };
        *device = parse(value).map_err(|why| wrong(key, why))?;
    }
    Ok(rates)
}

fn annotations(spec: &Spec) -> impl Iterator<Item = (&String, &String)> {
    spec.annotations().iter().flat_map(HashMap::iter)
}

fn wrong(key: &str, why: String) -> SpecError {
    SpecError::Value { path: format!("annotations.{key}"), why }
}

/// Words like `operations=1000` and `bytes=10M`: what a second allows.
fn parse(text: &str) -> Result<RateLimit, String> {
    const FORM: &str = "write operations=NUMBER, bytes=SIZE, or both with a blank in between";
    let mut limit = RateLimit::default();
    for word in text.split_whitespace() {
        let (name, value) = word.split_once('=').ok_or(FORM)?;
        let (number, field) = match name {
            "operations" => (
                value.parse().map_err(|error| format!("{value}: {error}"))?,
                &mut limit.operations_per_second,
            ),
            "bytes" => {
                (value.parse::<Size>().map_err(|error| error.to_string())?.0, &mut limit.bytes_per_second)
            }
            _ => return Err(FORM.into()),
        };
        *field = Some(NonZeroU64::new(number).ok_or("a limit of 0 would be the device's end")?);
    }
    if limit.is_none() { Err(FORM.into()) } else { Ok(limit) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(key: &str, value: &str) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.2.0", "annotations": {key: value}})).unwrap()
    }

    #[test]
    fn a_limit_is_of_operations_or_bytes_or_both() {
        let rates = |value| rates_of(&spec("dev.sandbox.rate.files", value)).unwrap().share;
        let limit = |operations, bytes| RateLimit {
            operations_per_second: NonZeroU64::new(operations),
            bytes_per_second: NonZeroU64::new(bytes),
        };
        assert_eq!(rates("operations=1000"), limit(1000, 0));
        assert_eq!(rates("bytes=10M"), limit(0, 10 << 20));
        assert_eq!(rates("operations=5 bytes=4096"), limit(5, 4096));
        assert_eq!(rates_of(&spec("another", "operations=1")).unwrap(), Rates::default());
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (key, value) in [
            ("dev.sandbox.rate.files", ""),
            ("dev.sandbox.rate.files", "1000"),
            ("dev.sandbox.rate.files", "operations=0"),
            ("dev.sandbox.rate.files", "operations=-1"),
            ("dev.sandbox.rate.files", "bytes=ten"),
            ("dev.sandbox.rate.network", "frames=1"),
            ("dev.sandbox.rate.disk", "operations=1"),
        ] {
            let error = rates_of(&spec(key, value)).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
