//! Block devices of the host in a container.

use std::process::Command;

use sandbox_tests::{Disk, Sandbox, sandbox, skip};
use serde_json::json;

const DISK_BYTES: u64 = 8 << 20;

/// A container with a block device at this path, of which this is allowed.
fn with(sandbox: Sandbox, disk: &Disk, path: &str, access: &str) -> Sandbox {
    sandbox.config(|config| {
        config["linux"]["devices"] = json!([disk.node(path)]);
        config["linux"]["resources"]["devices"] =
            json!([{"allow": false, "access": "rwm"}, disk.rule(access)]);
    })
}

#[test]
fn a_block_device_is_read_and_written_where_it_is() {
    let made = sandbox("block");
    let Some(disk) = Disk::new("block", &made.directory().join("disk"), DISK_BYTES) else { return };
    disk.write(512, "from the host");
    let mut made = with(made, &disk, "/dev/disk", "rwm");
    let script = "dd if=/dev/disk bs=512 skip=1 count=1 2>/dev/null | head -c 13 && echo && wc -c </dev/disk \
        && stat -c '%F %a %u:%g' /dev/disk \
        && echo from the guest | dd of=/dev/disk bs=512 seek=9 conv=notrunc 2>/dev/null \
        && dd if=/dev/zero of=/dev/disk bs=1M seek=8 count=1 2>&1 | grep -c 'No space'";
    made.run(["sh", "-c", script]).expect_stdout("from the host\n8388608\nblock special file 600 0:0\n1\n");
    // Nothing was synced in the container.
    assert_eq!(disk.read(9 * 512, 14), "from the guest");

    // The root is the host's own, which takes no nodes; and its user is another one, who owns the device.
    made = made.flag("--persist").config(|config| {
        config["linux"]["devices"][0] = disk.node("/data/block");
        for id in ["uid", "gid"] {
            config["linux"]["devices"][0][id] = 1000.into();
            config["process"]["user"][id] = 1000.into();
        }
    });
    let script = "stat -c '%F %a %u:%g' /data/block && dd if=/data/block bs=512 skip=9 count=1 2>/dev/null | head -c 14";
    made.run(["sh", "-c", script]).expect_stdout("block special file 600 1000:1000\nfrom the guest");
}

#[test]
fn a_file_system_of_a_block_device_is_mounted_in_the_container() {
    let made = sandbox("block-ext4");
    let Some(disk) = Disk::new("block-ext4", &made.directory().join("disk"), DISK_BYTES) else { return };
    let Ok(formatted) = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.path()).status() else {
        return skip("block-ext4", "mkfs.ext4 is not installed: apt-get install e2fsprogs");
    };
    assert!(formatted.success());
    let made = with(made, &disk, "/dev/disk", "rwm").capable(&[
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_CHOWN",
    ]);
    // It is not unmounted: the end of the container is.
    made.run(["sh", "-c", "mount -t ext4 /dev/disk /home && echo kept >/home/file"]).expect_code(0);
    made.run(["sh", "-c", "mount -t ext4 /dev/disk /home && cat /home/file && fstrim -v /home | wc -l"])
        .expect_stdout("kept\n1\n");
}

#[test]
fn a_block_device_without_a_rule_to_write_is_read_only() {
    let made = sandbox("block-read");
    let Some(disk) = Disk::new("block-read", &made.directory().join("disk"), DISK_BYTES) else { return };
    disk.write(0, "fixed");
    let made = with(made, &disk, "/dev/disk", "rm");
    let script =
        "head -c 5 /dev/disk && echo && cat /sys/block/loop0/ro && echo x >/dev/disk || echo refused";
    let outcome = made.run(["sh", "-c", script]).expect_code(0);
    assert_eq!(outcome.out(), "fixed\n1\nrefused\n", "{outcome}");
    assert_eq!(disk.read(0, 5), "fixed");

    // Of all devices none is the host's: these are the guest's own numbers.
    let made = made.config(|config| {
        config["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    });
    let outcome = made.run(["sh", "-c", "head -c 5 /dev/disk"]);
    assert!(!outcome.out().contains("fixed"), "{outcome}");
    made.expect_clean_and_usable();
}

#[test]
fn a_block_device_that_the_host_does_not_have_is_refused() {
    let made = sandbox("block-none").config(|config| {
        config["linux"]["devices"] = json!([
            {"path": "/dev/null2", "type": "c", "major": 1, "minor": 3},
            {"path": "/dev/disk", "type": "b", "major": 250, "minor": 9},
        ]);
        config["linux"]["resources"]["devices"] =
            json!([{"allow": true, "type": "b", "major": 250, "minor": 9, "access": "rw"}]);
    });
    made.run(["true"]).expect_error(125, &["`linux.devices[1]`", "block device 250:9", "No such device"]);
    made.expect_clean_and_usable();
}
