//! Limits of the kinds that few configurations have: raw files of the cgroup, huge pages, disks.

use sandbox_tests::{Sandbox, sandbox};
use serde_json::{Value, json};

/// The exit code of the runtime's own errors.
const ERROR: i32 = 125;

fn with_resource(name: &str, resource: &str, value: Value) -> Sandbox {
    sandbox(name).config(|config| config["linux"]["resources"][resource] = value)
}

fn show(files: &[&str]) -> [String; 3] {
    let paths: Vec<_> = files.iter().map(|file| format!("/sys/fs/cgroup/{file}")).collect();
    ["sh".into(), "-c".into(), format!("cat {}", paths.join(" "))]
}

#[test]
fn raw_files_of_the_cgroup() {
    let sandbox = with_resource(
        "unified",
        "unified",
        json!({"memory.high": "67108864", "pids.max": "77", "cgroup.max.depth": "3"}),
    );
    // The raw file has the last word.
    let sandbox = sandbox.config(|config| config["linux"]["resources"]["pids"] = json!({"limit": 20}));
    sandbox
        .run(show(&["memory.high", "pids.max", "cgroup.max.depth"]))
        .expect_code(0)
        .expect_stdout("67108864\n77\n3\n");
}

#[test]
fn raw_files_that_are_no_limits_of_the_guest_are_named() {
    let sandbox = sandbox("no-unified");
    for (file, value, words) in [
        ("frob.max", "1", ["linux.resources.unified.frob.max", "no such controller"]),
        ("memory.frob", "1", ["linux.resources.unified.memory.frob", "has no memory.frob"]),
        ("memory.high", "much", ["linux.resources.unified.memory.high", "refuses \"much\""]),
        ("cgroup.freeze", "1", ["linux.resources.unified.cgroup.freeze", "no limit"]),
        ("../memory.high", "1", ["linux.resources.unified.../memory.high", "not the name"]),
    ] {
        let mut config = sandbox.bundle.config();
        config["linux"]["resources"]["unified"] = json!({file: value});
        sandbox.bundle.write(&config);
        sandbox.run(["true"]).expect_error(ERROR, &words);
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn huge_pages() {
    let limits = |size: &str| json!([{"pageSize": size, "limit": 4 << 20}]);
    with_resource("huge-pages", "hugepageLimits", limits("2MB"))
        .run(show(&["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"]))
        .expect_stdout("4194304\n4194304\n");
    let sandbox = with_resource("no-huge-pages", "hugepageLimits", limits("64KB"));
    sandbox.run(["true"]).expect_error(ERROR, &["linux.resources.hugepageLimits[0]", "no hugetlb.64KB"]);
    sandbox.expect_clean_and_usable();
}

#[test]
fn weight_of_input_and_output() {
    with_resource("weight", "blockIO", json!({"weight": 505}))
        .run(show(&["io.weight"]))
        .expect_stdout("default 5000\n");
}

#[test]
fn limits_of_disks_that_the_guest_does_not_have_are_named() {
    let sandbox = sandbox("no-disk");
    for (field, key, value) in [
        ("weightDevice", "weight", 100),
        ("throttleReadBpsDevice", "rate", 1 << 20),
        ("throttleWriteBpsDevice", "rate", 1 << 20),
        ("throttleReadIOPSDevice", "rate", 100),
        ("throttleWriteIOPSDevice", "rate", 100),
    ] {
        let mut config = sandbox.bundle.config();
        config["linux"]["resources"]["blockIO"] = json!({field: [{"major": 250, "minor": 9, key: value}]});
        sandbox.bundle.write(&config);
        let path = format!("linux.resources.blockIO.{field}[0]");
        sandbox.run(["true"]).expect_error(ERROR, &[&path, "250:9", "No such device"]);
    }
    sandbox.expect_clean_and_usable();
}

#[test]
fn limits_of_a_disk_that_the_container_has_made() {
    let sandbox =
        sandbox("disk").capable(&["CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_DAC_OVERRIDE"]).config(|config| {
            config["linux"]["devices"] = json!([
                {"path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237},
                {"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0},
            ]);
            config["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        });
    let script = "dd if=/dev/zero of=/dev/shm/disk bs=1k count=64 && losetup -f /dev/shm/disk && echo ready \
        && exec sleep 1000";
    let mut container = sandbox.spawn(["sh", "-c", script]);
    container.wait_for_stdout("ready");
    let update = |resources: Value| {
        let file = sandbox.directory().join("resources.json");
        std::fs::write(&file, resources.to_string()).unwrap();
        sandbox.verb(["update", "--resources", file.to_str().unwrap(), &sandbox.id])
    };
    let limits = |files: &[&str]| {
        let [shell, option, script] = show(files);
        sandbox.verb(["exec", &sandbox.id, &shell, &option, &script]).expect_code(0).out()
    };
    let disk = |rate: u64| json!([{"major": 7, "minor": 0, "rate": rate}]);
    update(json!({"blockIO": {
        "throttleReadBpsDevice": disk(1 << 20), "throttleWriteBpsDevice": disk(2 << 20),
        "throttleReadIOPSDevice": disk(100), "throttleWriteIOPSDevice": disk(200),
    }}))
    .expect_code(0);
    let set = "7:0 rbps=1048576 wbps=2097152 riops=100 wiops=200\ndefault 100\n";
    assert_eq!(limits(&["io.max", "io.weight"]), set);
    // All or nothing: what comes before the device that is not there is put back.
    let mut devices = disk(5);
    devices.as_array_mut().unwrap().push(json!({"major": 250, "minor": 9, "rate": 5}));
    update(json!({"blockIO": {"weight": 20, "throttleReadBpsDevice": devices}}))
        .expect_error(1, &["linux.resources.blockIO.throttleReadBpsDevice[1]", "250:9"]);
    assert_eq!(limits(&["io.max", "io.weight"]), set);
    sandbox.verb(["kill", &sandbox.id, "KILL"]).expect_code(0);
    container.wait();
}
