//! The block devices of the host that a container is given: opened here, and shown to the guest of a machine that runs
//! as files of its share.
//!
//! A device is opened by its number, through a node in a file system in memory that is mounted nowhere: so it does not
//! matter what the host's `/dev` has, and nobody else can put another file in the place. The machine's process gets
//! the descriptor; it opens no device itself, and could not.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, ioctl_blksszget, makedev, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use sandbox_protocol::BlockDevice;
use sandbox_vmm_api::{ControlReply, ControlRequest, block_file};

use crate::spec::HostBlock;
use crate::vmm_control;

/// How long a machine may take to take a device, or to let go of it.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// A container could not be given a block device.
#[derive(Debug, thiserror::Error)]
#[error(
    "config.json: `linux.devices[{index}]`: cannot {step} the host's block device {major}:{minor}: {error}"
)]
pub struct BlockError {
    index: usize,
    step: &'static str,
    major: u32,
    minor: u32,
    error: io::Error,
}

/// A block device that a machine has.
#[derive(Clone, Debug)]
pub struct Given {
    /// Its number in the machine.
    number: u64,
    /// What the agent is told of it.
    pub device: BlockDevice,
}

impl Given {
    /// Whether the guest can change anything on it.
    pub fn is_writable(&self) -> bool {
        !self.device.read_only
    }
}

/// Gives devices to the machine that listens on this control socket; all of them or none.
pub fn give(machine: &Path, wanted: &[HostBlock]) -> Result<Vec<Given>, BlockError> {
    let mut given = Vec::new();
    for block in wanted {
        match give_one(machine, block) {
            Ok(one) => given.push(one),
            Err(error) => {
                take(machine, &given);
                return Err(error);
            }
        }
    }
    Ok(given)
}

/// Takes devices away. A machine that is gone has let go of them.
pub fn take(machine: &Path, given: &[Given]) {
    for Given { number, .. } in given {
        let request = ControlRequest::RemoveBlock { number: *number };
        let _ = vmm_control::ask(machine, request, None, ANSWER_TIME);
    }
}

fn give_one(machine: &Path, wanted: &HostBlock) -> Result<Given, BlockError> {
    let HostBlock { index, major, minor, .. } = *wanted;
    let failed = |step| move |error| BlockError { index, step, major, minor, error };
    let Opened { device, read_only } = open(wanted).map_err(Into::into).map_err(failed("open"))?;
    let sector_bytes = ioctl_blksszget(&device).map_err(Into::into).map_err(failed("measure"))?;
    let request = ControlRequest::AddBlock;
    let number = match vmm_control::ask(machine, request, Some(device.as_fd()), ANSWER_TIME) {
        Ok(ControlReply::Block { number }) => number,
        Ok(_) => return Err(failed("show the guest")(io::ErrorKind::InvalidData.into())),
        Err(error) => return Err(failed("show the guest")(error)),
    };
    let device = BlockDevice { major, minor, file: block_file(number), read_only, sector_bytes };
    Ok(Given { number, device })
}

struct Opened {
    device: OwnedFd,
    read_only: bool,
}

/// Opens a device by its number. One that cannot be written to is opened for reading, as its node would be.
fn open(wanted: &HostBlock) -> Result<Opened, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let directory = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let number = makedev(wanted.major, wanted.minor);
    mknodat(&directory, "block", FileType::BlockDevice, Mode::from_raw_mode(0o600), number)?;
    let open = |access| openat(&directory, "block", access | OFlags::CLOEXEC, Mode::empty());
    let read = || open(OFlags::RDONLY).map(|device| Opened { device, read_only: true });
    if wanted.read_only {
        return read();
    }
    match open(OFlags::RDWR) {
        Err(Errno::ACCESS | Errno::ROFS) => read(),
        opened => opened.map(|device| Opened { device, read_only: false }),
    }
}
