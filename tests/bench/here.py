"""On this machine: the software machine, and how long the command itself takes."""

import os
import re
import statistics
import subprocess
import sys
import time

import figures

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")


def milliseconds(command, runs):
    samples = []
    for _ in range(runs):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        samples.append((time.monotonic() - began) * 1000)
    return samples


def timings(command):
    """The steps that --timings prints, in milliseconds."""
    text = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr
    return {name.strip(): float(value) for name, value in re.findall(r"^(.*?) +([\d.]+) ms$", text, re.MULTILINE)}


def start_to_ready(bundle):
    """From the start of QEMU to the agent's greeting: all of the machine's start after that of QEMU, and the boot."""
    steps = timings([SANDBOX, "run", "--machine", "qemu", "--timings", bundle, "--", "true"])
    names = list(steps)
    since = names.index("of it: start qemu")
    until = names.index("boot guest")
    return sum(steps[name] for name in names[since : until + 1])


bundle, rounds = sys.argv[1], int(sys.argv[2])
version = milliseconds([SANDBOX, "--version"], 50)
figures.report("sandbox --version", statistics.median(version), "ms", 5, figures.spread(version, "ms"))

true = [SANDBOX, "run", "--machine", "qemu", bundle, "--", "true"]
milliseconds(true, 1)
whole = milliseconds(true, rounds)
figures.report("software machine: sandbox run of busybox true", statistics.median(whole) / 1000, "s", 1.5,
               figures.spread(whole, "ms"))
ready = [start_to_ready(bundle) for _ in range(rounds)]
figures.report("software machine: QEMU start to agent-ready", statistics.median(ready) / 1000, "s", 0.8,
               figures.spread(ready, "ms"))
