//! `-info` and `-v`: what the runtime can do, and which it is.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{self, Message};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use sandbox_runtime::features;

use crate::RUNTIME;

/// The name under which containerd knows the features of the OCI specification, which it has as JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What the runtime can do.
pub fn info() -> Result<Vec<u8>, protobuf::Error> {
    let features = Any {
        type_url: FEATURES.into(),
        value: features::features().to_string().into_bytes(),
        ..Any::default()
    };
    let version = RuntimeVersion {
        version: features::VERSION.into(),
        revision: features::COMMIT.into(),
        ..RuntimeVersion::default()
    };
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: Some(version).into(),
        features: Some(features).into(),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
}

/// Which it is.
pub fn version() -> String {
    format!("{RUNTIME} version {} (commit {})\n", features::VERSION, features::COMMIT)
}
