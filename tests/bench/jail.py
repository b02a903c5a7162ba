"""In the lab: what the jail costs, by turns with a sandbox-vmm that was built without its filters.

The jail itself cannot be left out, since devices name paths in it; what it takes is in the VMM's own timings.
"""

import os
import statistics
import subprocess
import sys
import time

import figures

BIN = os.environ["SANDBOX_BIN_DIR"]
SANDBOX = os.path.join(BIN, "sandbox")
CONFINED = os.path.join(BIN, "sandbox-vmm")
UNCONFINED = "/lab/unconfined/sandbox-vmm"
BUNDLE = "bundle"
STREAM_BYTES = 256 << 20
FILE_BYTES = 256 << 20


def run(vmm, *command):
    """Milliseconds of a run, and what it printed on standard error."""
    environment = dict(os.environ, SANDBOX_VMM=vmm)
    began = time.monotonic()
    done = subprocess.run([SANDBOX, "run", "--machine", "kvm", "--timings", BUNDLE, "--", *command], check=True,
                          env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return (time.monotonic() - began) * 1000, done.stderr


def step(timings, name):
    """The milliseconds of one step of the VMM's start."""
    for line in timings.splitlines():
        words = line.split()
        if name in line and len(words) > 2 and words[-1] == "ms":
            return float(words[-2])
    raise SystemExit(f"bench: no step {name!r} in the timings:\n{timings}")


def by_turns(rounds, *command):
    confined, unconfined = [], []
    for _ in range(rounds):
        confined.append(run(CONFINED, *command)[0])
        unconfined.append(run(UNCONFINED, *command)[0])
    return confined, unconfined


rounds = int(sys.argv[1])
jail = []
for turn in range(rounds):
    figures.note(f"jail {turn} of {rounds}")
    timings = run(CONFINED, "true")[1]
    jail.append(step(timings, "enter the jail") + step(timings, "confine the process"))
figures.report("start: jail and filters of the first thread", statistics.median(jail), "ms", 5,
               figures.spread(jail, "ms"))

confined, unconfined = by_turns(rounds, "true")
added = statistics.median(confined) - statistics.median(unconfined)
figures.report("start: with filters, more than without", added, "ms", 5, figures.spread(confined, "ms"))

with open(f"{BUNDLE}/rootfs/large", "wb") as large:
    large.truncate(FILE_BYTES)
for name, command in [
    ("stream of 256 MiB, without filters to with", ["head", "-c", str(STREAM_BYTES), "/dev/zero"]),
    ("file of 256 MiB, without filters to with", ["sh", "-c", "cat /large >/dev/null"]),
]:
    confined, unconfined = by_turns(max(rounds // 2, 1), *command)
    ratio = statistics.median(unconfined) / statistics.median(confined)
    verdict = "met" if ratio >= 0.98 else "MISSED"
    figures.report(name, ratio, "", None, f"target 0.98 or more: {verdict}, {figures.spread(confined, 'ms')}")
