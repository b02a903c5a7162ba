//! Block devices of the test's host: loop devices over files of the test.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::place::{patience, skip};
use crate::process::POLL;

/// A block device. Dropping it checks that nobody has it open any more.
pub struct Disk {
    device: PathBuf,
    file: PathBuf,
}

impl Disk {
    /// One of this many bytes over a new file. `None`, and a notice, where the host has none.
    pub fn new(test: &str, file: &Path, bytes: u64) -> Option<Self> {
        File::create(file).and_then(|file| file.set_len(bytes)).expect("a file");
        Self::over(test, file)
    }

    /// One over a file that is there.
    pub fn over(test: &str, file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let device = made.ok().filter(|made| made.status.success()).map(|made| made.stdout);
        let device = device.and_then(|out| String::from_utf8(out).ok()).map(|out| PathBuf::from(out.trim()));
        let is_block =
            |path: &PathBuf| fs::metadata(path).is_ok_and(|data| data.file_type().is_block_device());
        let Some(device) = device.filter(is_block) else {
            skip(test, "this host makes no loop devices");
            return None;
        };
        Some(Self { device, file: file.into() })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// Its major and minor number.
    pub fn numbers(&self) -> (u32, u32) {
        let device = fs::metadata(&self.device).expect("it is there").rdev();
        (rustix::fs::major(device), rustix::fs::minor(device))
    }

    /// An entry of `linux.devices` for it, at this path.
    pub fn node(&self, path: &str) -> Value {
        let (major, minor) = self.numbers();
        json!({"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o600, "uid": 0, "gid": 0})
    }

    /// An entry of `linux.resources.devices` that allows this of it.
    pub fn rule(&self, access: &str) -> Value {
        let (major, minor) = self.numbers();
        json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access})
    }

    /// Writes to it on the host.
    pub fn write(&self, offset: u64, text: &str) {
        let file = File::options().write(true).open(&self.device).expect("it can be opened");
        file.write_all_at(text.as_bytes(), offset).expect("it can be written to");
    }

    /// Reads from it on the host.
    pub fn read(&self, offset: u64, bytes: usize) -> String {
        let mut text = vec![0; bytes];
        let file = File::open(&self.device).expect("it can be opened");
        file.read_exact_at(&mut text, offset).expect("it can be read");
        String::from_utf8_lossy(&text).into_owned()
    }

    fn detached(&self) -> bool {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        let deadline = Instant::now() + patience();
        let file = self.file.display().to_string();
        let name = self.device.file_name().unwrap_or_default();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        // Another test may have the same device by then.
        while fs::read_to_string(&backing).is_ok_and(|backing| backing.trim_end() == file) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.detached(), "{} is in use", self.device.display());
        } else {
            let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        }
    }
}
