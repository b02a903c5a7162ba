"""On this machine: how long the verbs take that engines call all the time, and what a monitor takes of memory."""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time

import figures

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")
ENVIRONMENT = os.environ | {"SANDBOX_MACHINE": "qemu"}
LISTED = 50
ROUNDS = 30


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
def sandboxes(bundle, count):
    """So many sandboxes that run; the state root and the process ids of their monitors."""
    with tempfile.TemporaryDirectory(prefix="sbv-") as root:
        pids = []
        try:
            for number in range(count):
                pid_file = os.path.join(root, f"{number}.pid")
                verb(root, "run", "--detach", "--bundle", bundle, "--pid-file", pid_file, f"bench-{number}",
                     "--", "sleep", "1000")
                with open(pid_file) as file:
                    pids.append(int(file.read()))
                if number % 10 == 9:
                    figures.note(f"{number + 1} of {count} sandboxes run")
            yield root, pids
        finally:
            for number in range(count):
                verb(root, "delete", "--force", f"bench-{number}")


def monitor_of(pid):
    """The monitor: the one child of the process that stands for the container."""
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return int(children.read())


with sandboxes(sys.argv[1], LISTED) as (root, pids):
    measure(root, "sandbox state", 10, "state", "bench-0")
    measure(root, f"sandbox list of {LISTED}", 10, "list")
    measure(root, "sandbox kill", 10, "kill", "bench-0", "CONT")
    measure(root, "software machine: sandbox exec of true", None, "exec", "bench-0", "true")
    monitors = [resident_mib(monitor_of(pid)) for pid in pids]
    figures.report("resident memory of a monitor", statistics.median(monitors), "MiB", 6, figures.spread(monitors, "MiB"))
