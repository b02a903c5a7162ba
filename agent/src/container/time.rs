//! Time namespaces: clocks that differ from the guest's by an offset.
//!
//! A process that makes a time namespace is not in it: its children are, and it itself is once it has executed a
//! program (`time_namespaces(7)`). So the offsets, which are fixed as soon as anybody is in it, can be written after
//! it is made; and it needs no process in between.

use std::collections::HashMap;

use oci_spec::runtime::LinuxTimeOffset;

use rustix::process::DumpableBehavior;

use super::setup::SetupError;

/// The offsets of the time namespace that this process has made for what comes; its `/proc` must still be the guest's.
const OFFSETS: &str = "/proc/self/timens_offsets";

const DUMPABLE: &str = "have a file of its own in /proc";

/// Makes a time namespace for the program that this process will execute, and for its children.
pub fn make(offsets: Option<&HashMap<String, LinuxTimeOffset>>) -> Result<(), SetupError> {
    // SAFETY: this process has one thread and shares no file descriptors with any other.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWTIME) }
        .map_err(SetupError::step("make a time namespace"))?;
    // The file belongs to the guest's root where this process has become another user, unless it can be dumped.
    let dumpable = rustix::process::dumpable_behavior().map_err(SetupError::step(DUMPABLE))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(SetupError::step(DUMPABLE))?;
    let written = write(offsets);
    rustix::process::set_dumpable_behavior(dumpable).map_err(SetupError::step(DUMPABLE))?;
    written
}

fn write(offsets: Option<&HashMap<String, LinuxTimeOffset>>) -> Result<(), SetupError> {
    for (clock, offset) in offsets.into_iter().flatten() {
        let line = line(clock, offset);
        std::fs::write(OFFSETS, &line)
            .map_err(SetupError::step_of(|| format!("set linux.timeOffsets.{clock}, {:?}", line.trim())))?;
    }
    Ok(())
}

/// Clock, seconds, nanoseconds.
fn line(clock: &str, offset: &LinuxTimeOffset) -> String {
    format!("{clock} {} {}\n", offset.secs().unwrap_or_default(), offset.nanosecs().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_is_a_line() {
        let offset = |json: &str| serde_json::from_str::<LinuxTimeOffset>(json).unwrap();
        assert_eq!(line("boottime", &offset(r#"{"secs": -5, "nanosecs": 7}"#)), "boottime -5 7\n");
        assert_eq!(line("monotonic", &offset("{}")), "monotonic 0 0\n");
    }
}
