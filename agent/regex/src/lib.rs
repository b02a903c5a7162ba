//! `regex-lite` under the name of `regex`.
//!
//! oci-spec checks one field with a regular expression, `process.execCPUAffinity`, and virtiofsd's logger can filter by
//! one. For this, `regex` brings an engine with tables of Unicode to the agent, which every guest unpacks and holds in
//! memory, and to the commands, which relocate the tables at each start.

pub use regex_lite::*;
