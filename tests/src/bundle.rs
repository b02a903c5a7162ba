//! Bundles to run: a root file system of busybox and the probe, and a config.json.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

use crate::place::binary;

/// The `/etc/passwd` of every bundle.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n";

/// The `/etc/group` of every bundle.
const GROUP: &str = "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n";

/// A bundle in a directory of the test.
pub struct Bundle {
    path: PathBuf,
}

impl Bundle {
    /// Makes a bundle at `path` with a busybox root and the configuration that `sandbox spec` gives, except
    /// that the process has no terminal.
    pub fn make(path: &Path) -> Self {
        make_root(&path.join("rootfs")).unwrap_or_else(|e| panic!("cannot make a root file system: {e}"));
        let bundle = Self { path: path.to_owned() };
        let mut config = starting_config().clone();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = serde_json::json!(["/bin/true"]);
        bundle.write(&config);
        bundle
    }

    /// Packs its root file system into a tar archive, as engines import one.
    pub fn pack(&self, tar: &Path) {
        let mut command = Command::new("tar");
        command.arg("-C").arg(self.root("")).arg("-cf").arg(tar).arg(".");
        assert!(command.status().expect("tar can be started").success(), "tar failed");
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file or directory of its root file system.
    pub fn root(&self, path: &str) -> PathBuf {
        self.path.join("rootfs").join(path)
    }

    /// Its configuration.
    pub fn config(&self) -> Value {
        let text = fs::read(self.config_path()).expect("config.json can be read");
        serde_json::from_slice(&text).expect("config.json is JSON")
    }

    /// Where its configuration is.
    pub fn config_path(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Replaces its configuration.
    pub fn write(&self, config: &Value) {
        let text = serde_json::to_vec_pretty(config).expect("JSON can be written");
        fs::write(self.config_path(), text).expect("config.json can be written");
    }
}

fn make_root(root: &Path) -> std::io::Result<()> {
    for directory in ["bin", "dev", "etc", "home/user", "proc", "root", "sys", "tmp", "var/tmp"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let busybox = busybox();
    fs::copy(busybox, root.join("bin/busybox"))?;
    let applets = Command::new(busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::copy(binary("sandbox-probe"), root.join("bin/probe"))?;
    fs::write(root.join("etc/passwd"), PASSWD)?;
    fs::write(root.join("etc/group"), GROUP)
}

/// Debian's static busybox.
fn busybox() -> &'static Path {
    let path = Path::new("/bin/busybox");
    assert!(path.exists(), "{} is missing: apt-get install busybox-static", path.display());
    path
}

/// What `sandbox spec` prints or writes; read once.
fn starting_config() -> &'static Value {
    static CONFIG: OnceLock<Value> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let spec = Command::new(binary("sandbox")).arg("spec").current_dir(&directory).output();
        let spec = spec.expect("`sandbox spec` can be started");
        assert!(spec.status.success(), "`sandbox spec` failed: {}", String::from_utf8_lossy(&spec.stderr));
        let text = fs::read(directory.path().join("config.json")).unwrap_or(spec.stdout);
        serde_json::from_slice(&text).expect("`sandbox spec` gives JSON")
    })
}
