//! The real Podman over the shipped runtime.

use std::fs;

use sandbox_tests::Podman;
use sandbox_tests::podman::IMAGE;
use serde_json::Value;

/// A program that ends with 3 when it is told to.
const SERVICE: &str = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done";

#[test]
fn a_container_lives_in_the_background_and_is_entered_held_and_stopped() {
    let Some(podman) = Podman::new("podman-life") else { return };
    podman.start("box", "", SERVICE);
    podman.wait_for_log("box", "ready");
    podman.line("inspect box --format {{.State.Status}}").expect_stdout("running\n");
    podman.exec("box", "cat /proc/1/cmdline | head -c 2; exit 7").expect_code(7).expect_line("sh");
    podman.line("exec --user 1000:100 -w /tmp box id -u").expect_stdout("1000\n");
    podman.line("exec box no-such-program").expect_error(127, &["executable file not found"]);
    podman.line("exec box /etc/passwd").expect_error(126, &["permission denied"]);
    podman.line("top box -o pid,comm").expect_code(0).expect_line("1 sh");
    // Of the host's processes it shows none.
    assert_eq!(podman.line("top box").expect_code(0).out().lines().count(), 1);
    let stats = podman.line("stats --no-stream --format json box").expect_code(0);
    let stats: Value = serde_json::from_slice(&stats.stdout).expect("JSON");
    assert!(stats[0]["mem_usage"].as_str().is_some_and(|usage| !usage.starts_with("0B")), "{stats}");

    podman.line("pause box").expect_code(0);
    podman.line("inspect box --format {{.State.Status}}").expect_stdout("paused\n");
    podman.line("unpause box").expect_code(0);

    // A stop that has to kill takes 10 seconds and gives 137.
    podman.line("stop box").expect_code(0);
    podman.line("inspect box --format {{.State.ExitCode}}").expect_stdout("3\n");
    podman.line("logs box").expect_stdout("ready\ntold\n");
    podman.line("start box").expect_code(0);
    podman.line("kill box").expect_code(0);
    podman.line("wait box").expect_stdout("137\n");
    podman.line("rm box").expect_code(0);
}

#[test]
fn exit_codes_are_those_that_podman_documents() {
    let Some(podman) = Podman::new("podman-codes") else { return };
    podman.run("--rm", "exit 42").expect_code(42);
    let run = |program| podman.run_words_of(&format!("--rm --network none {IMAGE} {program}"));
    run("no-such-program").expect_error(127, &["executable file not found in"]);
    run("/no/such/program").expect_error(127, &["o such file or directory"]);
    run("/etc/passwd").expect_error(126, &["permission denied"]);
    podman.line("run --rm --no-such-option").expect_code(125);
}

#[test]
fn a_kill_for_lack_of_memory_is_told() {
    let Some(podman) = Podman::new("podman-memory") else { return };
    podman.start("hungry", "--memory 32m", "tail /dev/zero");
    podman.line("wait hungry").expect_stdout("137\n");
    podman.line("inspect hungry --format {{.State.OOMKilled}}").expect_stdout("true\n");
    podman.start("killed", "", "kill -KILL $$");
    podman.line("wait killed").expect_code(0);
    podman.line("inspect killed --format {{.State.OOMKilled}}").expect_stdout("false\n");
    podman.line("rm hungry killed").expect_code(0);
}

#[test]
fn a_network_of_the_host_is_refused_with_the_remedy() {
    let Some(podman) = Podman::new("podman-net") else { return };
    let outcome = podman.run_words_of(&format!("--rm --network ns:/proc/self/ns/net {IMAGE} true"));
    outcome.expect_error(126, &["linux.namespaces", "--network none"]);
}

#[test]
fn volumes_are_written_through_and_read_only_is_read_only() {
    let Some(podman) = Podman::new("podman-volumes") else { return };
    let data = podman.path("data");
    fs::create_dir(&data).expect("a directory");
    fs::write(data.join("in"), "from the host\n").expect("a file");
    let volumes = |script| {
        let data = data.display();
        podman.run(&format!("--rm -v {data}:/rw -v {data}:/ro:ro -v kept:/kept"), script)
    };
    volumes("cat /rw/in && echo out >/rw/out && cat /ro/out && echo kept >/kept/file")
        .expect_stdout("from the host\nout\n");
    volumes("echo no >/ro/no").expect_error(1, &["Read-only file system"]);
    volumes("cat /kept/file").expect_stdout("kept\n");
    assert_eq!(fs::read_to_string(data.join("out")).expect("a file"), "out\n");
    assert!(!data.join("no").exists());

    // Both have tmpfs that begin with what they hide.
    let script = "echo a >/tmp/a && grep -c root /etc/passwd && echo b >/etc/b && ! echo c 2>/dev/null >/c";
    podman.run("--rm --read-only --tmpfs /etc:size=1m", script).expect_stdout("1\n");
}

#[test]
fn limits_and_identities_hold() {
    let Some(podman) = Podman::new("podman-limits") else { return };
    let options = "--rm --memory 64M --cpus 1.5 --pids-limit 17 --ulimit nofile=100:200 --cap-drop all \
                   --user 1000:100 --hostname named --env COLOUR=blue --workdir /tmp --init";
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; ulimit -n; ulimit -Hn; nproc
        grep CapBnd /proc/self/status; id -u; id -g; hostname; echo $COLOUR $OLDPWD; cat /proc/1/comm";
    podman.run(options, script).expect_stdout(
        "67108864\n150000 100000\n17\n100\n200\n2\nCapBnd:\t0000000000000000\n1000\n100\nnamed\nblue /tmp\n\
         podman-init\n",
    );
    // The limit is the container's: what the virtual machine itself needs comes on top.
    podman.run("--rm --memory 4M", "echo it works").expect_stdout("it works\n");
}

#[test]
fn files_are_copied_to_and_from_the_container_and_never_the_host() {
    let Some(podman) = Podman::new("podman-files") else { return };
    let file = podman.path("file");
    fs::write(&file, "copied\n").expect("a file");
    fs::create_dir(podman.path("volume")).expect("a directory");
    let volume = podman.path("volume");
    podman.start("box", &format!("-v {}:/volume", volume.display()), SERVICE);
    podman.wait_for_log("box", "ready");
    let copy = |from: &str, to: &str| podman.podman(["cp", from, to]);
    let source = file.to_str().expect("a path");

    // The test's own path exists on the host only.
    let name = format!("/tmp/{}", podman.path("").file_name().expect("a name").display());
    copy(source, &format!("box:{name}-copy")).expect_code(0);
    podman.exec("box", &format!("cat {name}-copy")).expect_stdout("copied\n");
    assert!(!fs::exists(format!("{name}-copy")).expect("an answer"), "it was written to the host");
    copy(source, &format!("box:{source}")).expect_code(125);
    copy(source, "box:/volume/copy").expect_code(0);
    assert_eq!(fs::read_to_string(volume.join("copy")).expect("a file"), "copied\n");
    copy(source, "box:/proc/copy").expect_error(125, &["read-only"]);
    copy("box:/etc/passwd", podman.path("passwd").to_str().expect("a path")).expect_code(0);
    assert!(fs::read_to_string(podman.path("passwd")).expect("a file").contains("user:x:1000"));

    // What the guest wrote is there as well, and stays in an image.
    podman.exec("box", "echo written >/root/written").expect_code(0);
    podman.line("diff box").expect_code(0).expect_line("A /root/written");
    podman.line("commit --quiet box localhost/committed").expect_code(0);
    podman.line("rm --force --time 0 box").expect_code(0);
    let run = podman.run_words_of("--rm --network none localhost/committed cat /root/written");
    run.expect_stdout("written\n");
}

#[test]
fn a_terminal_goes_through_run_and_exec() {
    let Some(podman) = Podman::new("podman-tty") else { return };
    let mut terminal = podman.terminal("run -it --name box --network none localhost/busybox sh".split(' '));
    terminal.wait_for("# ");
    terminal.type_keys("stty size; tty\r");
    terminal.wait_for("24 80");
    terminal.wait_for("/dev/pts/");
    terminal.resize(100, 30);
    terminal.type_keys_until("stty size\r", "30 100");

    let mut inner = podman.terminal("exec -it box sh".split(' '));
    inner.wait_for("# ");
    inner.type_keys("tty; exit 4\r");
    inner.wait_for("/dev/pts/");
    assert_eq!(inner.wait(), 4);

    terminal.type_keys("exit 5\r");
    assert_eq!(terminal.wait(), 5);
}

#[test]
fn a_health_check_is_run_in_the_container() {
    let Some(podman) = Podman::new("podman-health") else { return };
    // Podman leaves the times to systemd, which may not run here; by hand it is the same check.
    let health =
        "run --detach --name box --network none --health-interval disable --health-retries 1 --health-cmd";
    let words = health.split(' ').chain(["test -e /tmp/well", IMAGE, "sleep", "1000"]);
    podman.podman(words).expect_code(0);
    podman.line("healthcheck run box").expect_code(1);
    podman.line("inspect box --format {{.State.Health.Status}}").expect_stdout("unhealthy\n");
    podman.exec("box", "touch /tmp/well").expect_code(0);
    podman.line("healthcheck run box").expect_code(0);
    podman.line("inspect box --format {{.State.Health.Status}}").expect_stdout("healthy\n");
    podman.line("rm --force --time 0 box").expect_code(0);
}

#[test]
fn an_image_is_built() {
    let Some(podman) = Podman::new("podman-build") else { return };
    let context = podman.path("context");
    fs::create_dir(&context).expect("a directory");
    let text =
        format!("FROM {IMAGE}\nRUN echo built >/made\nRUN test $(id -u) = 0 && cat /made\nCMD cat /made\n");
    fs::write(context.join("Containerfile"), text).expect("a file");
    let context = context.to_str().expect("a path");
    podman.podman(["build", "--network", "none", "--tag", "localhost/built", context]).expect_code(0);
    podman.run_words_of("--rm --network none localhost/built").expect_stdout("built\n");
}

#[test]
fn a_container_whose_processes_were_killed_is_over() {
    let Some(podman) = Podman::new("podman-killed") else { return };
    podman.start("box", "", SERVICE);
    let pid = podman.line("inspect box --format {{.State.Pid}}").expect_code(0).out();
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().expect("a process id"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is there");
    podman.line("wait box").expect_stdout("137\n");
    podman.line("start box").expect_code(0);
    podman.wait_for_log("box", "ready");
    // Not by `rm --force`, which gives up when a slow machine takes 5 seconds.
    podman.line("kill box").expect_code(0);
    podman.line("wait box").expect_stdout("137\n");
    podman.line("rm box").expect_code(0);
}
