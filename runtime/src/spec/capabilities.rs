//! Capabilities that nobody knows: the specification has them left out with a warning.

use oci_spec::runtime::Capability;
use serde_json::Value;

/// Takes the names that are no capabilities out of a configuration's `process`. Returns what is to be said of them. What
/// has another form than that of names is left to the reading that follows.
pub fn leave_out_unknown(process: &mut Value) -> Vec<String> {
    let mut said = Vec::new();
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for (set, names) in sets.into_iter().flatten() {
        let Some(names) = names.as_array_mut() else { continue };
        names.retain(|name| {
            let unknown = name.is_string() && serde_json::from_value::<Capability>(name.clone()).is_err();
            if unknown {
                said.push(format!("process.capabilities.{set}: {name} is no capability, and is left out"));
            }
            !unknown
        });
    }
    said
}
