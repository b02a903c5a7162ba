//! Block devices of the host: each is a file of the share, and becomes a device of the guest by a loop device over it.
//!
//! The configuration has a device by its number on the host. Wherever it stands there it is replaced by the loop
//! device's number: in the nodes, in the rules, and in the limits of input and output. A loop device is the
//! container's from before its process is there until it has been deleted.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};
use rustix::fs::{Gid, Mode, Uid};
use sandbox_loop_device::{MAJOR, Wanted, node_of};
use sandbox_protocol::{BlockDevice, SHARE_MOUNT};
use serde_json::Value;

/// A block device could not be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} for the host's block device {major}:{minor}: {source}")]
pub struct BlockError {
    step: &'static str,
    major: u32,
    minor: u32,
    source: io::Error,
}

/// A loop device over a device of the host. Dropping it detaches it, at once or when its last user is gone.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
}

/// Attaches all that a container is given, and puts them into its configuration.
pub fn attach(devices: &[BlockDevice], spec: &mut Spec) -> Result<Vec<LoopDevice>, BlockError> {
    let Some(first) = devices.first() else { return Ok(Vec::new()) };
    let mut attached = Vec::with_capacity(devices.len());
    for device in devices {
        attached.push(LoopDevice::over(device)?);
    }
    let numbers: Vec<_> = devices.iter().zip(&attached).map(|(of, by)| (of, by.number)).collect();
    // All at once: the number of a loop device may be that of another device on the host.
    let renumbered = renumbered(spec, |number| {
        let is = |of: &BlockDevice| number == (of.major.into(), of.minor.into());
        numbers.iter().find(|(of, _)| is(of)).map(|(_, number)| (MAJOR, *number))
    });
    *spec = renumbered.map_err(io::Error::from).map_err(failed(first, "change the configuration"))?;
    for (device, attached) in devices.iter().zip(&attached) {
        let failed = failed(device, "give its owner a loop device");
        attached.give(spec).map_err(|error| failed(error.into()))?;
    }
    Ok(attached)
}

fn failed(device: &BlockDevice, step: &'static str) -> impl Fn(io::Error) -> BlockError {
    let (major, minor) = (device.major, device.minor);
    move |source| BlockError { step, major, minor, source }
}

impl LoopDevice {
    fn over(device: &BlockDevice) -> Result<Self, BlockError> {
        let read_only = device.read_only;
        let file = Path::new(SHARE_MOUNT).join(&device.file);
        let file = File::options().read(true).write(!read_only).open(file);
        let file = file.map_err(failed(device, "open the file of the share"))?;
        // What programs read and write is in the cache of the device once, and not in that of the file as well.
        let wanted =
            Wanted { read_only, direct: true, sector_bytes: device.sector_bytes, ..Wanted::default() };
        let attached = sandbox_loop_device::attach(file.as_fd(), wanted);
        let attached = attached.map_err(failed(device, "attach a loop device"))?;
        Ok(Self { number: attached.number })
    }

    /// Makes the guest's own node as the container's is to be: it is shown where a root has no nodes.
    fn give(&self, spec: &Spec) -> rustix::io::Result<()> {
        let is = |device: &&LinuxDevice| {
            device.typ() == LinuxDeviceType::B
                && (device.major(), device.minor()) == (MAJOR.into(), self.number.into())
        };
        let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
        let Some(device) = devices.iter().find(is) else { return Ok(()) };
        let node = node_of(self.number);
        let owner = Uid::from_raw(device.uid().unwrap_or(0));
        let group = Gid::from_raw(device.gid().unwrap_or(0));
        rustix::fs::chown(&node, Some(owner), Some(group))?;
        rustix::fs::chmod(&node, Mode::from_raw_mode(device.file_mode().unwrap_or(0o666) & 0o7777))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The node is the guest's own, and the device there: nothing keeps it.
        let _ = sandbox_loop_device::detach(self.number);
    }
}

/// The lists of a configuration whose entries are block devices, or may be.
const LISTS: [&str; 7] = [
    "/linux/devices",
    "/linux/resources/devices",
    "/linux/resources/blockIO/weightDevice",
    "/linux/resources/blockIO/throttleReadBpsDevice",
    "/linux/resources/blockIO/throttleWriteBpsDevice",
    "/linux/resources/blockIO/throttleReadIOPSDevice",
    "/linux/resources/blockIO/throttleWriteIOPSDevice",
];

/// A configuration with other numbers of block devices in it.
fn renumbered(
    spec: &Spec,
    number: impl Fn((i64, i64)) -> Option<(u32, u32)>,
) -> Result<Spec, serde_json::Error> {
    let mut spec = serde_json::to_value(spec)?;
    for list in LISTS {
        for entry in spec.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let is_block = entry.get("type").is_none_or(|kind| kind == "b");
            let of = |name: &str| entry.get(name).and_then(Value::as_i64);
            if let (true, Some(major), Some(minor)) = (is_block, of("major"), of("minor"))
                && let Some((major, minor)) = number((major, minor))
                && let Some(entry) = entry.as_object_mut()
            {
                entry.insert("major".into(), major.into());
                entry.insert("minor".into(), minor.into());
            }
        }
    }
    serde_json::from_value(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_are_replaced_wherever_the_device_stands_and_nowhere_else() {
        let with = |disk: Value, other: Value| {
            let (d, o) = (&disk, &other);
            json!({"ociVersion": "1.2.0", "root": {"path": "rootfs"}, "linux": {
                "devices": [
                    {"path": "/dev/disk", "type": "b", "major": d[0], "minor": d[1]},
                    {"path": "/dev/other", "type": "b", "major": o[0], "minor": o[1]},
                    {"path": "/dev/char", "type": "c", "major": 8, "minor": 1}],
                "resources": {
                    "devices": [
                        {"allow": false, "access": "rwm"},
                        {"allow": true, "type": "b", "major": d[0], "minor": d[1], "access": "rw"},
                        {"allow": true, "type": "c", "major": 8, "minor": 1, "access": "rw"},
                        {"allow": true, "type": "b", "major": 8, "access": "r"}],
                    "blockIO": {
                        "weightDevice": [{"major": d[0], "minor": d[1], "weight": 10}],
                        "throttleReadBpsDevice": [{"major": d[0], "minor": d[1], "rate": 1}],
                        "throttleWriteIOPSDevice": [{"major": o[0], "minor": o[1], "rate": 1}]}}}})
        };
        let spec: Spec = serde_json::from_value(with(json!([8, 1]), json!([7, 0]))).unwrap();
        // The loop device of the one has the number that the other has on the host.
        let number = |of| match of {
            (8, 1) => Some((7, 0)),
            (7, 0) => Some((7, 1)),
            _ => None,
        };
        let wanted: Spec = serde_json::from_value(with(json!([7, 0]), json!([7, 1]))).unwrap();
        assert_eq!(renumbered(&spec, number).unwrap(), wanted);
    }
}
