//! A host with systemd, where the tests run on one without it: a Debian in a container without a machine of its own,
//! in which the real host's files are at `/host`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::unpack;
use crate::place::skip;
use crate::process::Process;
use crate::{Outcome, Sandbox};

/// What this needs of the host.
const PROGRAMS: [&str; 3] = ["podman", "runc", "busctl"];

/// Starts systemd where it finds a mount in the place of each controller of version 1 that the host does not use: it
/// would mount those, and their hierarchies would be the host's for as long as one has a cgroup. Docker, for one, then
/// reads no statistics of its containers any more.
const INIT: &str = r#"cd /sys/fs/cgroup || exit
if [ "$(stat --file-system --format %T .)" = tmpfs ]; then
    unused=$(awk '$2 == 0 && $4 == 1 { print $1 }' /proc/cgroups)
    case $unused in *net_cls*) unused="$unused net_cls,net_prio" ;; esac
    for name in $unused; do
        mkdir -p "$name" && mount -t tmpfs -o ro none "$name" || exit
    done
fi
exec /sbin/init"#;

/// Makes the real host's files the root, with the devices, processes and services of the container.
const ENTER: &str = r#"for at in proc sys dev run; do mount --rbind "/$at" "/host/$at" || exit 99; done
exec chroot /host "$@""#;

/// Such a host. It goes when this is dropped.
pub struct SystemdHost {
    name: String,
    directory: PathBuf,
}

impl SystemdHost {
    /// Boots one from the archive of a Debian with systemd, with a directory of its own. `None`, and a notice, where that
    /// cannot be had.
    ///
    /// # Panics
    ///
    /// When the directory cannot be made.
    pub fn boot(test: &str, directory: &Path, archive: &Path) -> Option<Self> {
        let missing = |program: &&&str| Command::new(program).arg("--version").output().is_err();
        if let Some(program) = PROGRAMS.iter().find(missing) {
            skip(test, &format!("{program} is not installed: apt-get install podman runc systemd"));
            return None;
        }
        let root = directory.join("root");
        fs::create_dir_all(&root).expect("a directory");
        unpack(archive, &root);
        fs::create_dir(root.join("host")).expect("a directory");
        let name = format!("systemd-host-{}", std::process::id());
        let host = Self { name, directory: directory.to_owned() };
        let parent = format!("/{}", host.name);
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];
        let booted = host.podman(
            [
                "run",
                "--detach",
                "--name",
                &host.name,
                "--privileged",
                "--systemd=always",
                "--network",
                "none",
            ]
            .into_iter()
            .chain(limits)
            .chain(["--cgroup-parent", &parent, "--volume", "/:/host", "--rootfs"])
            .chain([root.to_str().expect("a path"), "/bin/sh", "-c", INIT]),
        );
        if booted.code() != Some(0) {
            skip(test, &format!("runc runs no container with systemd here: {booted}"));
            return None;
        }
        Some(host)
    }

    /// Runs a shell script among its own files.
    pub fn sh(&self, script: &str) -> Outcome {
        self.podman(["exec", &self.name, "sh", "-c", script])
    }

    /// `sandbox --systemd-cgroup` with these words, without its standard output, which is that of what it leaves running.
    pub fn sandbox<'a>(&self, sandbox: &Sandbox, words: impl IntoIterator<Item = &'a str>) -> Outcome {
        let command = sandbox.verb_command(["--systemd-cgroup"].into_iter().chain(words));
        let errors = self.directory.join("errors");
        let quiet = format!("\"$@\" >/dev/null 2>{0}; code=$?; cat {0} >&2; exit $code", errors.display());
        self.script_about(&quiet, &command)
    }

    /// Runs a shell script among the real host's files; its arguments are a command line, with the environment of which
    /// it runs.
    pub fn script_about(&self, script: &str, command: &Command) -> Outcome {
        let mut all: Vec<OsString> =
            ["exec", &self.name, "unshare", "--mount", "sh", "-c", ENTER, "sh", "env"].map(Into::into).into();
        let given = ["SANDBOX_KERNEL", "SANDBOX_IMAGE"];
        let given = given.into_iter().filter_map(|name| Some((name.into(), std::env::var_os(name)?)));
        let named = command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
        for (mut word, value) in given.chain(named) {
            word.push("=");
            word.push(value);
            all.push(word);
        }
        all.extend(["sh", "-c", script, "sh"].map(Into::into));
        all.push(command.get_program().to_owned());
        all.extend(command.get_args().map(ToOwned::to_owned));
        self.podman(all)
    }

    fn podman<A: Into<OsString>>(&self, words: impl IntoIterator<Item = A>) -> Outcome {
        let mut command = Command::new("podman");
        for (option, name) in [("--root", "storage"), ("--runroot", "run"), ("--tmpdir", "libpod")] {
            command.arg(option).arg(self.directory.join(name));
        }
        command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        command.args(["--runtime", "runc"]).args(words.into_iter().map(Into::into));
        Process::spawn(&mut command).wait()
    }
}

impl Drop for SystemdHost {
    fn drop(&mut self) {
        let _ = self.podman(["rm", "--force", "--time", "0", &self.name]);
        let top = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([top.to_owned()]) {
            remove_cgroups(&hierarchy.join(&self.name));
        }
    }
}

/// Removes a cgroup with all that is below it.
fn remove_cgroups(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    // What is not there, or not empty, is the leak check's affair.
    let _ = fs::remove_dir(path);
}
