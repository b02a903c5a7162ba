//! The bundle's files: untouched by default, written through with `--persist`, read-only where it is said.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use sandbox_tests::{Sandbox, sandbox};
use serde_json::json;

#[test]
fn by_default_the_bundle_stays_as_it_was() {
    let sandbox = sandbox("untouched");
    fs::write(sandbox.bundle.root("etc/kept"), "kept").unwrap();
    let before = listing(&sandbox.bundle.root(""));
    let script = "echo new >/new; echo changed >/etc/kept; rm /etc/group; mkdir /dir; chmod 700 /tmp; \
                  mv /etc/passwd /moved; cat /etc/kept /new";
    sandbox.run(["sh", "-c", script]).expect_stdout("changed\nnew\n");
    assert_eq!(listing(&sandbox.bundle.root("")), before);
    assert_eq!(fs::read_to_string(sandbox.bundle.root("etc/kept")).unwrap(), "kept");
    // And nothing of it is there the next time.
    sandbox.run(["sh", "-c", "cat /etc/kept; ls /new"]).expect_error(1, &["/new"]);
}

#[test]
fn persist_writes_through() {
    let sandbox = sandbox("persist").flag("--persist").capable(&FILE_CAPABILITIES);
    let script = "echo new >/new; rm /etc/group; mkdir -p /dir/deep; ln -s new /link; chown 1000:2000 /new; chmod 641 /new";
    sandbox.run(["sh", "-c", script]).expect_code(0);
    let new = fs::metadata(sandbox.bundle.root("new")).unwrap();
    assert_eq!(fs::read_to_string(sandbox.bundle.root("new")).unwrap(), "new\n");
    assert_eq!((new.uid(), new.gid(), new.mode() & 0o7777), (1000, 2000, 0o641));
    assert!(!sandbox.bundle.root("etc/group").exists());
    assert!(sandbox.bundle.root("dir/deep").is_dir());
    assert_eq!(fs::read_link(sandbox.bundle.root("link")).unwrap(), Path::new("new"));
    sandbox.run(["cat", "/new"]).expect_stdout("new\n");
}

#[test]
fn programs_find_every_file_semantic_on_a_root_that_is_written_through() {
    check_files(sandbox("semantics").flag("--persist"), "/tmp");
}

#[test]
fn programs_find_every_file_semantic_on_the_overlay() {
    check_files(sandbox("overlay"), "/tmp");
}

#[test]
fn programs_find_every_file_semantic_on_a_bind_mount() {
    let sandbox = sandbox("bind");
    let source = made(&sandbox, "source");
    check_files(sandbox.mount("/data", "bind", source, &["rbind", "rw"]), "/data");
}

/// A page of memory has one program first and another then: an emulator that keeps what it translated of the first has
/// to be made to notice.
#[test]
fn a_program_in_the_memory_of_another_is_not_taken_for_it() {
    const EACH: usize = 200;
    let sandbox = sandbox("recycled").config(|config| config["linux"]["readonlyPaths"] = json!([]));
    for (code, name) in [(1, "one"), (2, "two")] {
        for count in 0..EACH {
            let path = sandbox.bundle.root(&format!("bin/{name}-{count}"));
            fs::write(&path, program_that_ends_with(code)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    let script = "for code in 1 2; do
            for program in /bin/$1-*; do $program; [ $? = $code ] || echo $program; done
            echo 3 >/proc/sys/vm/drop_caches; shift
        done";
    sandbox.run(["sh", "-c", script, "sh", "one", "two"]).expect_stdout("");
}

/// The smallest ELF program, in two whole pages of which the first is executed.
fn program_that_ends_with(code: u8) -> Vec<u8> {
    const ADDRESS: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    const BYTES: u64 = 8192;
    // mov edi, code; mov eax, 231 (exit_group); syscall
    let instructions = [0xbf, code, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05];
    // elf(5): e_ident, ET_EXEC for EM_X86_64, e_entry, one program header after this one.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for value in [ADDRESS + HEADERS, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0u16, 0, 64, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    // PT_LOAD, readable and executable: offset, addresses, sizes, alignment.
    file.extend([1u32, 5].map(u32::to_le_bytes).concat());
    file.extend([0, ADDRESS, ADDRESS, BYTES, BYTES, 4096].map(u64::to_le_bytes).concat());
    file.extend(instructions);
    file.resize(BYTES as usize, 0);
    file
}

/// What the checks need: changing owners and modes of any file, and making special files.
const FILE_CAPABILITIES: [&str; 6] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_DAC_READ_SEARCH"];

fn check_files(sandbox: Sandbox, directory: &str) {
    let outcome = sandbox.capable(&FILE_CAPABILITIES).run(["probe", "files", directory]).expect_code(0);
    assert!(outcome.out().lines().filter(|line| line.starts_with("ok ")).count() > 20, "{outcome}");
}

#[test]
fn a_bind_mount_is_the_host_s_directory() {
    let sandbox = sandbox("bind-rw");
    let source = made(&sandbox, "source");
    fs::write(source.join("from-host"), "from the host\n").unwrap();
    let sandbox = sandbox.mount("/data", "bind", &source, &["rbind", "rw"]);
    let script = "cat /data/from-host; echo from the guest >/data/from-guest";
    sandbox.run(["sh", "-c", script]).expect_stdout("from the host\n");
    assert_eq!(fs::read_to_string(source.join("from-guest")).unwrap(), "from the guest\n");
}

#[test]
fn a_bind_mount_of_a_file_and_one_relative_to_the_bundle() {
    let sandbox = sandbox("bind-file");
    fs::write(sandbox.bundle.path().join("one"), "one\n").unwrap();
    let sandbox = sandbox.mount("/etc/one", "bind", "one", &["bind", "ro"]);
    sandbox.run(["sh", "-c", "cat /etc/one; echo x >/etc/one"]).expect_code(1);
    assert_eq!(fs::read_to_string(sandbox.bundle.path().join("one")).unwrap(), "one\n");
}

#[test]
fn a_read_only_bind_mount_holds_on_the_host_s_side() {
    let sandbox =
        sandbox("bind-ro").capable(&["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"]);
    let source = made(&sandbox, "source");
    prepare_target(&source);
    let inner = source.join("inner");
    fs::create_dir(&inner).unwrap();
    let mount = HostMount::tmpfs(&inner);
    prepare_target(&inner);
    let before = listing(&source);
    let sandbox = sandbox.mount("/data", "bind", &source, &["rbind", "ro"]);
    // The guest's root may do away with its own mount's flag; the host still refuses.
    let script = "probe read-only /data && probe read-only /data/inner || exit 1; \
                  mount -o remount,rw,bind /data || exit 2; \
                  probe read-only /data && probe read-only /data/inner";
    sandbox.run(["sh", "-c", script]).expect_code(0);
    assert_eq!(listing(&source), before);
    drop(mount);
}

#[test]
fn a_read_only_root_is_read_only_and_its_mounts_are_not() {
    let sandbox = sandbox("root-ro")
        .capable(&FILE_CAPABILITIES)
        .config(|config| config["root"]["readonly"] = true.into())
        .mount("/tmp", "tmpfs", "tmpfs", &["size=1m"]);
    prepare_target(&sandbox.bundle.root(""));
    sandbox.run(["sh", "-c", "probe read-only / && echo x >/tmp/x && cat /tmp/x"]).expect_stdout("x\n");
}

/// What `probe read-only` looks for.
fn prepare_target(directory: &Path) {
    fs::write(directory.join("file"), "content").unwrap();
    fs::create_dir(directory.join("directory")).unwrap();
}

fn made(sandbox: &Sandbox, name: &str) -> PathBuf {
    let path = sandbox.directory().join(name);
    fs::create_dir(&path).unwrap();
    path
}

/// A mount of the test's own on the host.
struct HostMount(PathBuf);

impl HostMount {
    fn tmpfs(at: &Path) -> Self {
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), None).expect("the tests run as root");
        Self(at.to_owned())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Every path below a directory with its mode, size and time.
fn listing(top: &Path) -> Vec<String> {
    let find =
        std::process::Command::new("find").arg(top).args(["-printf", "%P %m %s %T@ %l\n"]).output().unwrap();
    assert!(find.status.success());
    let mut lines: Vec<_> = String::from_utf8_lossy(&find.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn a_mount_made_later_on_the_host_is_not_seen_whatever_the_propagation() {
    let sandbox = sandbox("propagation").command(["sleep", "1000"]);
    let data = sandbox.directory().join("data");
    fs::create_dir_all(data.join("inner")).expect("a directory");
    mount_bind(&data, &data).expect("root");
    mount_change(&data, MountPropagationFlags::SHARED).expect("root");
    let sandbox = sandbox.mount("/slave", "bind", &data, &["rbind", "rslave"]).mount(
        "/shared",
        "bind",
        &data,
        &["rbind", "rshared"],
    );
    let container = sandbox.start();
    mount("tmpfs", data.join("inner"), "tmpfs", MountFlags::empty(), None).expect("root");
    fs::write(data.join("inner/file"), "").expect("a file");
    fs::write(data.join("beside"), "").expect("a file");
    let seen = sandbox.exec(&[], ["ls", "/slave", "/slave/inner", "/shared", "/shared/inner"]);
    // Nor does it keep the host from taking it away again.
    unmount(data.join("inner"), UnmountFlags::empty()).expect("nobody else has it");
    container.end();
    unmount(&data, UnmountFlags::DETACH).expect("root");
    seen.expect_stdout(
        "/shared:\nbeside\ninner\n\n/shared/inner:\n\n/slave:\nbeside\ninner\n\n/slave/inner:\n",
    );
}
