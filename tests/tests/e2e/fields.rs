//! Every honoured field of config.json has an effect that a process in the container can see.
//!
//! A machine's boot is the cost here, so that each test looks at a whole group of fields.

use sandbox_tests::{Outcome, Sandbox, sandbox};
use serde_json::{Value, json};

/// Runs shell commands, each of which prints `NAME=value`.
fn ask(sandbox: &Sandbox, questions: &[(&str, &str)]) -> Outcome {
    let script: Vec<_> =
        questions.iter().map(|(name, command)| format!("echo {name}=$({{ {command}; }} 2>&1)")).collect();
    sandbox.run(["sh", "-c", &script.join("\n")]).expect_code(0)
}

/// Asks and compares each answer.
fn expect(sandbox: &Sandbox, rows: &[(&str, &str, &str)]) -> Outcome {
    let questions: Vec<_> = rows.iter().map(|(name, command, _)| (*name, *command)).collect();
    let outcome = ask(sandbox, &questions);
    for (name, _, value) in rows {
        outcome.expect_value(name, value);
    }
    outcome
}

#[test]
fn profiles_and_labels_of_the_host_s_kernel_have_no_effect() {
    let sandbox = sandbox("labels").config(|config| {
        config["process"]["apparmorProfile"] = "docker-default".into();
        config["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0".into();
        config["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0".into();
    });
    sandbox.run(["echo", "runs"]).expect_stdout("runs\n");
}

#[test]
fn process_user_groups_umask_directory_and_environment() {
    let sandbox = sandbox("identity").config(|config| {
        config["process"]["user"] =
            json!({"uid": 1000, "gid": 1000, "additionalGids": [2000, 3000], "umask": 0o27});
        config["process"]["cwd"] = "/var/tmp".into();
        config["process"]["env"] = json!(["PATH=/bin", "WORD=value"]);
        config["process"]["oomScoreAdj"] = 321.into();
    });
    expect(
        &sandbox,
        &[
            ("uid", "id -u", "1000"),
            ("gid", "id -g", "1000"),
            ("groups", "id -G", "1000 2000 3000"),
            ("umask", "umask", "0027"),
            ("cwd", "pwd", "/var/tmp"),
            ("word", "echo $WORD", "value"),
            ("oom", "cat /proc/self/oom_score_adj", "321"),
        ],
    );
}

#[test]
fn process_working_directory_is_made_where_it_is_missing() {
    let sandbox = sandbox("cwd").config(|config| config["process"]["cwd"] = "/new/place".into());
    sandbox.run(["pwd"]).expect_stdout("/new/place\n");
}

#[test]
fn process_capabilities_in_all_five_sets() {
    let sandbox = sandbox("capabilities").config(|config| {
        config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        config["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SYS_TIME"],
            "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
            "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
            "ambient": ["CAP_KILL", "CAP_NET_RAW"],
            "effective": ["CAP_KILL"],
        });
    });
    // After execve by a user who is not root, permitted and effective are what was ambient.
    let field = |name: &str| format!("awk '/^{name}:/{{print $2}}' /proc/self/status");
    expect(
        &sandbox,
        &[
            ("bounding", &field("CapBnd"), "0000000002002021"),
            ("inheritable", &field("CapInh"), "0000000000002020"),
            ("ambient", &field("CapAmb"), "0000000000002020"),
            ("permitted", &field("CapPrm"), "0000000000002020"),
            ("effective", &field("CapEff"), "0000000000002020"),
        ],
    );
    let root = sandbox.config(|config| {
        config["process"]["user"] = json!({"uid": 0, "gid": 0});
        config["process"]["capabilities"] =
            json!({"bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]});
    });
    expect(
        &root,
        &[
            ("effective", &field("CapEff"), "0000000000000001"),
            ("ambient", &field("CapAmb"), "0000000000000000"),
        ],
    );
}

#[test]
fn process_rlimits_and_no_new_privileges() {
    let limit = |name: &str| format!("awk '/^{name}/{{print $(NF-2), $(NF-1)}}' /proc/self/limits");
    let sandbox = sandbox("limits").config(|config| {
        config["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096},
            {"type": "RLIMIT_STACK", "soft": 1_048_576, "hard": 2_097_152},
        ]);
        config["process"]["noNewPrivileges"] = true.into();
    });
    let new_privileges = "awk '/^NoNewPrivs/{print $2}' /proc/self/status";
    expect(
        &sandbox,
        &[
            ("files", &limit("Max open files"), "100 200"),
            ("core", &limit("Max core file size"), "0 4096"),
            ("stack", &limit("Max stack size"), "1048576 2097152"),
            ("nnp", new_privileges, "1"),
        ],
    );
    let without = sandbox.config(|config| config["process"]["noNewPrivileges"] = false.into());
    expect(&without, &[("nnp", new_privileges, "0")]);
}

#[test]
fn names_of_host_and_domain_and_sysctl() {
    let sandbox = sandbox("names").config(|config| {
        config["hostname"] = "a-host".into();
        config["domainname"] = "a.domain".into();
        config["linux"]["sysctl"] =
            json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "9000", "net.core.somaxconn": "321"});
    });
    expect(
        &sandbox,
        &[
            ("host", "hostname", "a-host"),
            ("domain", "cat /proc/sys/kernel/domainname", "a.domain"),
            ("forward", "cat /proc/sys/net/ipv4/ip_forward", "1"),
            ("msgmax", "cat /proc/sys/kernel/msgmax", "9000"),
            ("somaxconn", "cat /proc/sys/net/core/somaxconn", "321"),
        ],
    );
}

#[test]
fn mounts_of_every_type_with_their_options() {
    let sandbox = sandbox("mounts")
        .mount(
            "/scratch",
            "tmpfs",
            "tmpfs",
            &["nosuid", "nodev", "noexec", "size=1m", "mode=1770", "uid=5", "gid=6"],
        )
        .mount("/open/deep", "tmpfs", "tmpfs", &["size=1m", "mode=1777"])
        .mount("/fixed", "tmpfs", "tmpfs", &["ro"]);
    // The options of a mount and of its file system.
    let options = |at: &str| format!("awk '$5==\"{at}\"{{print $6 \",\" $NF}}' /proc/self/mountinfo");
    let kind = |at: &str| {
        format!("awk '$5==\"{at}\"{{for(i=7;i<=NF;i++) if($i==\"-\") print $(i+1)}}' /proc/self/mountinfo")
    };
    let outcome = expect(
        &sandbox,
        &[
            ("proc", &kind("/proc"), "proc"),
            ("dev", &kind("/dev"), "tmpfs"),
            ("pts", &kind("/dev/pts"), "devpts"),
            ("shm", &kind("/dev/shm"), "tmpfs"),
            ("mqueue", &kind("/dev/mqueue"), "mqueue"),
            ("sys", &kind("/sys"), "sysfs"),
            ("cgroup", &kind("/sys/fs/cgroup"), "cgroup2"),
            ("scratch", &kind("/scratch"), "tmpfs"),
            ("mode", "stat -c '%a %u %g' /scratch", "1770 5 6"),
            ("read_only", "touch /fixed/x", "touch: /fixed/x: Read-only file system"),
            (
                "size",
                "dd if=/dev/zero of=/open/deep/x bs=1k count=2000 2>&1 | grep -o 'No space'",
                "No space",
            ),
        ],
    );
    drop(outcome);
    let outcome = ask(
        &sandbox,
        &[("scratch", &options("/scratch")), ("sys", &options("/sys")), ("pts", &options("/dev/pts"))],
    );
    for word in ["nosuid", "nodev", "noexec", "size=1024k"] {
        assert!(outcome.value("scratch").contains(word), "{word}\n{outcome}");
    }
    assert!(outcome.value("sys").starts_with("ro,"), "{outcome}");
    for word in ["ptmxmode=666", "mode=620", "gid=5"] {
        assert!(outcome.value("pts").contains(word), "{word}\n{outcome}");
    }
}

#[test]
fn namespaces_are_made_as_listed_and_left_out_as_not() {
    // The agent, process 1 of the guest, is visible from a container without a PID namespace.
    let shared = sandbox("namespaces").config(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] == "mount");
    });
    let questions = [("first", "cat /proc/1/comm"), ("self", "echo $$"), ("interfaces", "ls /sys/class/net")];
    let outcome = ask(&shared, &questions);
    assert_ne!(outcome.value("self"), "1", "{outcome}");
    assert_ne!(outcome.value("first"), "sh", "{outcome}");
    let own = sandbox("own-namespaces");
    let outcome = ask(&own, &questions);
    outcome.expect_value("self", "1").expect_value("first", "sh").expect_value("interfaces", "lo");
}

#[test]
fn default_devices_and_those_of_the_configuration() {
    let sandbox = sandbox("devices").config(|config| {
        config["linux"]["devices"] = json!([
            {"path": "/dev/my/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8},
            {"path": "/dev/a-fifo", "type": "p", "fileMode": 0o600},
        ]);
        config["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "r"},
        ]);
    });
    expect(
        &sandbox,
        &[
            ("null", "echo x >/dev/null && cat /dev/null | wc -c", "0"),
            ("zero", "head -c 3 /dev/zero | wc -c", "3"),
            ("full", "echo x >/dev/full", "sh: write error: No space left on device"),
            ("random", "head -c 8 /dev/urandom | wc -c", "8"),
            ("tty", "stat -c %F /dev/tty", "character special file"),
            ("ptmx", "readlink /dev/ptmx", "pts/ptmx"),
            ("fd", "readlink /dev/fd", "/proc/self/fd"),
            ("stdout", "readlink /dev/stdout", "/proc/self/fd/1"),
            ("mine", "stat -c '%a %u %g %t:%T' /dev/my/zero", "640 7 8 1:5"),
            ("fifo", "stat -c '%F' /dev/a-fifo", "fifo"),
        ],
    );
}

#[test]
fn device_access_follows_the_rules_of_the_cgroup() {
    // /dev/mem-like nodes: kmsg (1:11) may be made but not opened.
    let sandbox =
        sandbox("device-rules").capable(&["CAP_MKNOD", "CAP_SYSLOG", "CAP_DAC_OVERRIDE"]).config(|config| {
            config["linux"]["devices"] = json!([{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}]);
        });
    expect(
        &sandbox,
        &[
            ("refused", "head -c 1 /dev/kmsg", "head: /dev/kmsg: Operation not permitted"),
            ("made", "mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem", "head: /tmp/mem: Operation not permitted"),
        ],
    );
    let allowed = sandbox.config(|config| {
        let rules = config["linux"]["resources"]["devices"].as_array_mut().unwrap();
        rules.push(json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}));
    });
    expect(&allowed, &[("allowed", "head -c 1 /dev/kmsg | wc -c", "1")]);
}

#[test]
fn masked_and_read_only_paths() {
    let sandbox = sandbox("paths").config(|config| {
        config["linux"]["maskedPaths"] = json!(["/etc/group", "/home", "/no/such/path"]);
        config["linux"]["readonlyPaths"] = json!(["/etc", "/proc/sys", "/no/such/path"]);
    });
    std::fs::write(sandbox.bundle.root("home/secret"), "secret").unwrap();
    expect(
        &sandbox,
        &[
            ("file", "cat /etc/group | wc -c", "0"),
            ("directory", "ls /home | wc -l", "0"),
            ("etc", "touch /etc/x", "touch: /etc/x: Read-only file system"),
            (
                "sys",
                "echo 1 >/proc/sys/kernel/msgmax",
                "sh: can't create /proc/sys/kernel/msgmax: Read-only file system",
            ),
        ],
    );
}

#[test]
fn seccomp_refuses_kills_and_allows() {
    const GETPPID: &str = "110";
    const GETPGRP: &str = "111";
    const GETUID: &str = "102";
    let sandbox = sandbox("seccomp").config(|config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
                {"names": ["getpgrp"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
                 "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
            ],
        });
    });
    let outcome = expect(
        &sandbox,
        &[
            ("errno", &format!("probe syscall {GETPPID} | sed s/errno=//"), "95"),
            ("allowed", &format!("probe syscall {GETUID} | sed s/errno=//"), "0"),
            ("killed", &format!("probe syscall {GETPGRP}; echo $?"), "Bad system call 159"),
            ("mkdir", "mkdir /tmp/x", "mkdir: can't create directory '/tmp/x': Operation not permitted"),
            ("argument", "kill -USR1 1", "sh: can't kill pid 1: Permission denied"),
            ("mode", "awk '/^Seccomp:/{print $2}' /proc/self/status", "2"),
        ],
    );
    drop(outcome);
}

#[test]
fn resources_of_memory_cpu_and_pids() {
    let sandbox = sandbox("resources").config(|config| {
        config["linux"]["resources"]["memory"] =
            json!({"limit": 96 << 20, "reservation": 32 << 20, "swap": 96 << 20});
        config["linux"]["resources"]["cpu"] =
            json!({"shares": 2048, "quota": 50000, "period": 100_000, "cpus": "0", "mems": "0"});
        config["linux"]["resources"]["pids"] = json!({"limit": 20});
    });
    let file = |name: &str| format!("cat /sys/fs/cgroup/{name}");
    expect(
        &sandbox,
        &[
            ("limit", &file("memory.max"), &(96 << 20).to_string()),
            ("reservation", &file("memory.low"), &(32 << 20).to_string()),
            ("quota", &file("cpu.max"), "50000 100000"),
            ("cpus", &file("cpuset.cpus"), "0"),
            ("mems", &file("cpuset.mems"), "0"),
            ("pids", &file("pids.max"), "20"),
            ("fork_bomb", "for i in $(seq 40); do sleep 5 & done 2>&1 | grep -c -m 1 fork", "1"),
        ],
    );
    let weight: u32 = ask(&sandbox, &[("weight", &file("cpu.weight"))]).value("weight").parse().unwrap();
    assert!((70..90).contains(&weight), "2048 shares are a weight of about 79, not {weight}");
}

#[test]
fn the_machine_s_cpus_follow_from_the_quota() {
    let sandbox = sandbox("quota").config(|config| {
        config["linux"]["resources"]["cpu"] = json!({"quota": 150_000, "period": 100_000});
    });
    sandbox.run(["nproc"]).expect_stdout("2\n");
}

#[test]
fn root_propagation_and_absolute_root_path() {
    let sandbox = sandbox("root");
    let elsewhere = sandbox.directory().join("elsewhere");
    std::fs::rename(sandbox.bundle.root(""), &elsewhere).unwrap();
    let sandbox = sandbox.config(|config| {
        config["root"]["path"] = Value::from(elsewhere.to_str().unwrap());
        config["linux"]["rootfsPropagation"] = "private".into();
    });
    sandbox.run(["cat", "/etc/group"]).expect_line("extra:x:2000:user");
}

#[test]
fn annotations_are_accepted() {
    let sandbox =
        sandbox("annotations").config(|config| config["annotations"] = json!({"any.thing": "goes"}));
    sandbox.run(["echo", "x"]).expect_stdout("x\n");
}
