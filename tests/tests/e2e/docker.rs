//! The real Docker over the shipped runtime.

use std::fs;

use sandbox_tests::Docker;
use sandbox_tests::docker::IMAGE;
use sandbox_tests::place::skip;
use serde_json::Value;

/// A program that ends with 3 when it is told to.
const SERVICE: &str = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done";

#[test]
fn a_container_lives_in_the_background_and_is_entered_held_and_stopped() {
    let Some(docker) = Docker::new("docker-life") else { return };
    docker.start("box", "", SERVICE);
    docker.wait_for_log("box", "ready");
    assert_eq!(docker.inspect("box", "{{.State.Status}}"), "running");
    docker.exec("box", "cat /proc/1/cmdline | head -c 2; exit 7").expect_code(7).expect_line("sh");
    docker.line("exec --user 1000:100 -w /tmp -e A=b box id -u").expect_stdout("1000\n");
    // Docker gives 126 for each: with runc as well.
    docker
        .line("exec box no-such-program")
        .expect_code(126)
        .expect_words(&["executable file not found in $PATH"]);
    docker.line("exec box /no/such").expect_code(126).expect_words(&["no such file or directory"]);
    docker.line("exec box /etc/passwd").expect_code(126).expect_words(&["permission denied"]);

    // It looks up what runs on the host, where the container is its machine.
    let top = docker.line("top box -o pid,args").expect_code(0).out();
    assert!(top.contains(&docker.inspect("box", "{{.State.Pid}}")) && top.contains("sandbox-vmm"), "{top}");
    let stats = docker.docker(["stats", "--no-stream", "--format", "{{json .}}", "box"]).expect_code(0);
    let stats: Value = serde_json::from_slice(&stats.stdout).expect("JSON");
    match &Docker::controllers_in_its_way()[..] {
        [] => assert!(stats["MemUsage"].as_str().is_some_and(|usage| !usage.starts_with("0B")), "{stats}"),
        left => skip(
            "docker-life (statistics)",
            &format!("hierarchies of this host are mounted nowhere: {left:?}"),
        ),
    }

    docker.line("pause box").expect_code(0);
    assert_eq!(docker.inspect("box", "{{.State.Status}}"), "paused");
    docker.line("unpause box").expect_code(0);
    docker.line("update --memory 128M --memory-swap -1 box").expect_code(0);
    docker.exec("box", "cat /sys/fs/cgroup/memory.max").expect_stdout("134217728\n");

    // A stop that has to kill takes 10 seconds and gives 137.
    docker.line("stop box").expect_code(0);
    assert_eq!(docker.inspect("box", "{{.State.ExitCode}}"), "3");
    docker.line("logs box").expect_stdout("ready\ntold\n");
    docker.line("start box").expect_code(0);
    docker.line("kill box").expect_code(0);
    docker.line("wait box").expect_stdout("137\n");
    docker.line("restart box").expect_code(0);
    docker.line("rm --force box").expect_code(0);
}

#[test]
fn exit_codes_are_those_that_docker_documents() {
    let Some(docker) = Docker::new("docker-codes") else { return };
    docker.run("--rm", "exit 42").expect_code(42);
    let run = |program| docker.docker(["run", "--rm", "--network", "none", IMAGE, program]);
    run("no-such-program").expect_error(127, &["executable file not found in"]);
    run("/no/such/program").expect_error(127, &["no such file or directory"]);
    run("/etc/passwd").expect_error(126, &["permission denied"]);
    docker.line("run --rm --no-such-option").expect_code(125);
}

#[test]
fn volumes_are_written_through_and_read_only_is_read_only() {
    let Some(docker) = Docker::new("docker-volumes") else { return };
    let data = docker.path("shared");
    fs::create_dir(&data).expect("a directory");
    fs::write(data.join("in"), "from the host\n").expect("a file");
    let volumes = |script| {
        let data = data.display();
        docker.run(&format!("--rm -v {data}:/rw -v {data}:/ro:ro -v kept:/kept"), script)
    };
    volumes("cat /rw/in && echo out >/rw/out && cat /ro/out && echo kept >/kept/file")
        .expect_stdout("from the host\nout\n");
    volumes("echo no >/ro/no").expect_error(1, &["Read-only file system"]);
    volumes("cat /kept/file").expect_stdout("kept\n");
    assert_eq!(fs::read_to_string(data.join("out")).expect("a file"), "out\n");
    assert!(!data.join("no").exists());
    let script = "echo a >/tmp/a && cat /tmp/a && ! echo b 2>/dev/null >/b";
    docker.run("--rm --read-only --tmpfs /tmp:size=1m", script).expect_stdout("a\n");
}

#[test]
fn limits_and_identities_hold() {
    let Some(docker) = Docker::new("docker-limits") else { return };
    let options = "--rm --memory 64M --cpus 1.5 --pids-limit 17 --ulimit nofile=100:200 --cap-drop all \
                   --user 1000:100 --hostname named --env COLOUR=blue --workdir /tmp --init";
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; ulimit -n; ulimit -Hn; nproc
        grep CapBnd /proc/self/status; id -u; id -g; hostname; echo $COLOUR $OLDPWD; cat /proc/1/comm";
    docker.run(options, script).expect_stdout(
        "67108864\n150000 100000\n17\n100\n200\n2\nCapBnd:\t0000000000000000\n1000\n100\nnamed\nblue /tmp\n\
         docker-init\n",
    );
    // The limit is the container's: who passes it is killed in the guest, and the machine is none the worse.
    let eater = "head -c 60000000 /dev/zero | tr '\\0' x | sort >/dev/null; echo $?";
    docker.start("box", "--memory 32M", "while :; do sleep 1; done");
    docker.exec("box", eater).expect_stdout("137\n");
    docker.exec("box", "echo alive").expect_stdout("alive\n");
    docker.line("rm --force box").expect_code(0);
    docker.run("--rm --memory 32M", "x=$(head -c 60000000 /dev/zero | tr '\\0' x)").expect_code(137);
}

#[test]
fn a_health_check_is_run_in_the_container() {
    let Some(docker) = Docker::new("docker-health") else { return };
    let check = "run --detach --name box --network none --health-interval 1s --health-retries 1 --health-cmd";
    let words = check.split(' ').chain(["test -e /tmp/well", IMAGE, "sleep", "1000"]);
    docker.docker(words).expect_code(0);
    docker.wait_for("box", "{{.State.Health.Status}}", "unhealthy");
    docker.exec("box", "touch /tmp/well").expect_code(0);
    docker.wait_for("box", "{{.State.Health.Status}}", "healthy");
    docker.line("rm --force box").expect_code(0);
}

#[test]
fn files_are_copied_to_and_from_the_container_and_kept_in_images() {
    let Some(docker) = Docker::new("docker-files") else { return };
    let file = docker.path("file");
    fs::write(&file, "copied\n").expect("a file");
    let volume = docker.path("volume");
    fs::create_dir(&volume).expect("a directory");
    docker.start("box", &format!("-v {}:/volume", volume.display()), SERVICE);
    docker.wait_for_log("box", "ready");
    let copy = |from: &str, to: &str| docker.docker(["cp", from, to]);
    let source = file.to_str().expect("a path");
    copy(source, "box:/root/copy").expect_code(0);
    docker.exec("box", "cat /root/copy").expect_stdout("copied\n");
    copy(source, "box:/volume/copy").expect_code(0);
    assert_eq!(fs::read_to_string(volume.join("copy")).expect("a file"), "copied\n");
    copy("box:/etc/passwd", docker.path("passwd").to_str().expect("a path")).expect_code(0);
    assert!(fs::read_to_string(docker.path("passwd")).expect("a file").contains("user:x:1000"));

    // What the guest wrote is there as well, and stays in an image.
    docker.exec("box", "echo written >/root/written").expect_code(0);
    docker.line("diff box").expect_code(0).expect_line("A /root/written");
    docker.line("commit box committed").expect_code(0);
    docker.line("rm --force box").expect_code(0);
    docker.line("run --rm --network none committed cat /root/written").expect_stdout("written\n");
}

#[test]
fn a_terminal_goes_through_run_and_exec() {
    let Some(docker) = Docker::new("docker-tty") else { return };
    let mut terminal = docker.terminal("run -it --name box --network none busybox sh".split(' '));
    terminal.wait_for("# ");
    terminal.type_keys_until("stty size\r", "24 80");
    terminal.type_keys("tty\r");
    terminal.wait_for("/dev/pts/");
    terminal.resize(100, 30);
    terminal.type_keys_until("stty size\r", "30 100");

    let mut inner = docker.terminal("exec -it box sh".split(' '));
    inner.wait_for("# ");
    inner.type_keys("tty; exit 4\r");
    inner.wait_for("/dev/pts/");
    assert_eq!(inner.wait(), 4);

    terminal.type_keys("exit 5\r");
    assert_eq!(terminal.wait(), 5);
    docker.line("rm box").expect_code(0);
}

#[test]
fn an_image_is_built() {
    let Some(docker) = Docker::new("docker-build") else { return };
    let context = docker.path("context");
    fs::create_dir(&context).expect("a directory");
    let text =
        format!("FROM {IMAGE}\nRUN echo built >/made\nRUN test $(id -u) = 0 && cat /made\nCMD cat /made\n");
    fs::write(context.join("Dockerfile"), text).expect("a file");
    let context = context.to_str().expect("a path");
    docker.docker(["build", "--network", "none", "--tag", "built", context]).expect_code(0);
    docker.line("run --rm --network none built").expect_stdout("built\n");
}

#[test]
fn a_container_whose_processes_were_killed_is_over() {
    let Some(docker) = Docker::new("docker-killed") else { return };
    docker.start("box", "", SERVICE);
    let pid = docker.inspect("box", "{{.State.Pid}}").parse().expect("a process id");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .expect("it is there");
    docker.line("wait box").expect_stdout("137\n");
    docker.line("start box").expect_code(0);
    docker.wait_for_log("box", "ready");
    docker.line("rm --force box").expect_code(0);
}
