"""In the lab: memory of a sandbox that idles in `sleep`, host side.

The VMM's own memory is what is resident outside guest memory; the whole is the proportional set size of all
processes of the sandbox, guest pages included.
"""

import os
import re
import subprocess
import time

import figures

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")
SETTLING_SECONDS = 20
# Guest memory is the one mapping of at least this size.
GUEST_MEMORY_KIB = 64 << 10


def descendants(root):
    """The process and all that it started."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(name))
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, [])
    return found


def mappings(pid):
    """(size, resident, proportional) of each mapping, in KiB."""
    with open(f"/proc/{pid}/smaps") as smaps:
        text = smaps.read()
    sizes, resident, proportional = (
        [int(size) for size in re.findall(rf"^{name}: +(\d+) kB$", text, re.MULTILINE)] for name in ("Size", "Rss", "Pss"))
    return list(zip(sizes, resident, proportional))


def command(pid):
    with open(f"/proc/{pid}/comm") as comm:
        return comm.read().strip()


sandbox = subprocess.Popen([SANDBOX, "run", "--machine", "kvm", "bundle", "--", "sleep", "1000"])
try:
    time.sleep(SETTLING_SECONDS)
    processes = {pid: mappings(pid) for pid in descendants(sandbox.pid)}
    vmm = next(pid for pid in processes if command(pid) == "sandbox-vmm")
    own = sum(resident for size, resident, _ in processes[vmm] if size < GUEST_MEMORY_KIB)
    guest = sum(resident for size, resident, _ in processes[vmm] if size >= GUEST_MEMORY_KIB)
    whole = sum(proportional for maps in processes.values() for _, _, proportional in maps)
finally:
    # A sandbox ends with its caller; `sleep`, first process of its namespace, would ignore a polite signal.
    sandbox.kill()
    sandbox.wait()
figures.report("VMM resident outside guest memory", own / 1024, "MiB", 5)
figures.report("guest memory resident", guest / 1024, "MiB")
figures.report("sandbox idling in sleep, all processes (PSS)", whole / 1024, "MiB", 40)
