"""On this machine: how long the verbs take that engines call all the time, what a monitor takes of memory, and
whether many sandboxes, at once and one after the other, leave something behind."""

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time

import figures
import traces

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")
# In the environment of every process of the sandboxes, and in the names of their cgroups.
MARK = f"sandbox-bench-{os.getpid()}"
ENVIRONMENT = os.environ | {"SANDBOX_MACHINE": "qemu", "SANDBOX_BENCH_MARK": MARK}
LISTED = 50
ROUNDS = 30
LIVES = 200


def verb(root, *words, **options):
    return subprocess.run([SANDBOX, "--root", root, *words], check=True, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def milliseconds(root, *words):
    samples = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        verb(root, *words)
        samples.append((time.monotonic() - began) * 1000)
    return samples


def measure(root, name, target, *words):
    samples = milliseconds(root, *words)
    figures.report(name, statistics.median(samples), "ms", target, figures.spread(samples, "ms"))


def resident_mib(pid):
    """Resident memory, the program's own pages included, which all monitors share."""
    with open(f"/proc/{pid}/smaps_rollup") as smaps:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in smaps if line.endswith("kB\n")}
    return sizes["Rss"] / 1024


@contextlib.contextmanager
def sandboxes(root, pid_file, bundle, count):
    """So many sandboxes that run; the process ids of what stands for them."""
    pids = []
    try:
        for number in range(count):
            verb(root, "run", "--detach", "--bundle", bundle, "--pid-file", pid_file, f"bench-{number}",
                 "--", "sleep", "1000")
            pids.append(read_pid(pid_file))
            if number % 10 == 9:
                figures.note(f"{number + 1} of {count} sandboxes run")
        yield pids
    finally:
        for number in range(count):
            verb(root, "delete", "--force", f"bench-{number}")


def read_pid(path):
    with open(path) as file:
        return int(file.read())


def live(root, pid_file, bundle):
    """One life in the hands of an engine, in milliseconds."""
    began = time.monotonic()
    verb(root, "create", "--bundle", bundle, "--pid-file", pid_file, "bench-life")
    stands = os.pidfd_open(read_pid(pid_file))
    try:
        verb(root, "start", "bench-life")
        poll = select.poll()
        poll.register(stands, select.POLLIN)
        poll.poll()
    finally:
        os.close(stands)
    verb(root, "delete", "bench-life")
    return (time.monotonic() - began) * 1000


def bundle_in(directory, original):
    """The bundle with `true` as its process and a cgroup of its own."""
    with open(os.path.join(original, "config.json")) as file:
        config = json.load(file)
    config["root"]["path"] = os.path.abspath(os.path.join(original, config["root"]["path"]))
    config["process"]["args"] = ["true"]
    config["linux"]["cgroupsPath"] = f"/{MARK}"
    os.mkdir(directory)
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump(config, file)
    return directory


def report_traces(name, before, root):
    """Fails when something is there that was not there before. The last processes have a moment to end."""
    deadline = time.monotonic() + 10
    while (left := traces.now(root, MARK) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    for trace in sorted(left):
        figures.note(f"left behind: {trace}")
    figures.report(name, len(left), "", 0)


def monitor_of(pid):
    """The monitor: the one child of the process that stands for the container."""
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return int(children.read())


with tempfile.TemporaryDirectory(prefix="sbv-") as directory:
    root, pid_file = os.path.join(directory, "root"), os.path.join(directory, "pid")
    os.mkdir(root, mode=0o700)
    before = traces.now(root, MARK)
    with sandboxes(root, pid_file, sys.argv[1], LISTED) as pids:
        measure(root, "sandbox state", 10, "state", "bench-0")
        measure(root, f"sandbox list of {LISTED}", 10, "list")
        measure(root, "sandbox kill", 10, "kill", "bench-0", "CONT")
        monitors = [resident_mib(monitor_of(pid)) for pid in pids]
        figures.report("resident memory of a monitor", statistics.median(monitors), "MiB", 6,
                       figures.spread(monitors, "MiB"))
    report_traces(f"left behind by {LISTED} sandboxes at once", before, root)

    bundle = bundle_in(os.path.join(directory, "bundle"), sys.argv[1])
    lives = []
    for number in range(LIVES):
        lives.append(live(root, pid_file, bundle))
        if number % 20 == 19:
            figures.note(f"{number + 1} of {LIVES} lives")
    figures.report("software machine: create, start, end and delete of true", statistics.median(lives), "ms", None,
                   figures.spread(lives, "ms"))
    report_traces(f"left behind by {LIVES} lives, one after the other", before, root)
