//! The first request: clock, entropy, host name and the share.

use std::fs::File;
use std::os::fd::AsRawFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::mount::MountFlags;
use rustix::thread::ClockId;
use sandbox_protocol::{Configure, SHARE_MOUNT};

/// The virtio-fs tag of the machine's one share.
const SHARE_TAG: &str = "share";

/// The most bytes of entropy taken, far more than the pool's 32.
const MAX_ENTROPY_BYTES: usize = 512;

/// Why the guest could not be configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// The clock was refused.
    #[error("cannot set the guest's clock to {time_ns} ns after the epoch: {source}")]
    Clock {
        /// The time asked for.
        time_ns: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The entropy is not base64 of at most [`MAX_ENTROPY_BYTES`].
    #[error("the entropy is not base64 of at most {MAX_ENTROPY_BYTES} bytes")]
    EntropyFormat,
    /// The entropy was refused.
    #[error("cannot add entropy to /dev/urandom: {0}")]
    Entropy(std::io::Error),
    /// The host name was refused.
    #[error("cannot set the guest's host name to {name:?}: {source}")]
    Hostname {
        /// The name asked for.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// The share was refused.
    #[error("cannot mount the virtio-fs share {SHARE_TAG:?} at {SHARE_MOUNT}: {0}")]
    Share(std::io::Error),
}

/// Configures the guest.
pub fn configure(wanted: &Configure) -> Result<(), ConfigureError> {
    set_clock(wanted.time_ns)?;
    add_entropy(&wanted.entropy)?;
    set_hostname(&wanted.hostname)?;
    if wanted.share {
        mount_share()?;
    }
    Ok(())
}

fn set_clock(time_ns: u64) -> Result<(), ConfigureError> {
    const NS_PER_S: u64 = 1_000_000_000;
    let time = rustix::fs::Timespec {
        tv_sec: i64::try_from(time_ns / NS_PER_S).unwrap_or(i64::MAX),
        tv_nsec: (time_ns % NS_PER_S) as _,
    };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .map_err(|e| ConfigureError::Clock { time_ns, source: e.into() })
}

/// The kernel's `struct rand_pool_info`.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: i32,
    size_bytes: i32,
    bytes: [u8; MAX_ENTROPY_BYTES],
}

fn add_entropy(base64: &str) -> Result<(), ConfigureError> {
    let entropy = STANDARD.decode(base64).map_err(|_| ConfigureError::EntropyFormat)?;
    let mut pool = RandPoolInfo { entropy_bits: 0, size_bytes: 0, bytes: [0; MAX_ENTROPY_BYTES] };
    pool.bytes.get_mut(..entropy.len()).ok_or(ConfigureError::EntropyFormat)?.copy_from_slice(&entropy);
    pool.size_bytes = entropy.len() as i32;
    pool.entropy_bits = pool.size_bytes * 8;

    let device = File::options().write(true).open("/dev/urandom").map_err(ConfigureError::Entropy)?;
    nix::ioctl_write_ptr_bad!(
        rnd_add_entropy,
        nix::request_code_write!(b'R', 0x03, 2 * std::mem::size_of::<i32>()),
        RandPoolInfo
    );
    // SAFETY: the kernel reads size_bytes, which is at most the length of the array behind it.
    unsafe { rnd_add_entropy(device.as_raw_fd(), &pool) }.map_err(|e| ConfigureError::Entropy(e.into()))?;
    Ok(())
}

fn set_hostname(name: &str) -> Result<(), ConfigureError> {
    rustix::system::sethostname(name.as_bytes())
        .map_err(|e| ConfigureError::Hostname { name: name.to_owned(), source: e.into() })
}

fn mount_share() -> Result<(), ConfigureError> {
    std::fs::create_dir_all(SHARE_MOUNT).map_err(ConfigureError::Share)?;
    rustix::mount::mount(SHARE_TAG, SHARE_MOUNT, "virtiofs", MountFlags::empty(), None)
        .map_err(|e| ConfigureError::Share(e.into()))?;
    read_further_ahead();
    Ok(())
}

/// How far the kernel reads ahead on the share, in KiB. What virtio-fs starts with, 128, leaves half the speed of
/// a sequential read on the way to the host and back.
const READ_AHEAD_KIB: u32 = 1024;

/// It is for speed only, so nothing is said where it fails.
fn read_further_ahead() {
    if let Ok(share) = rustix::fs::stat(SHARE_MOUNT) {
        let (major, minor) = (rustix::fs::major(share.st_dev), rustix::fs::minor(share.st_dev));
        let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        let _ = std::fs::write(setting, READ_AHEAD_KIB.to_string());
    }
}
