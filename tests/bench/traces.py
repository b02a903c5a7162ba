"""What sandboxes leave on this machine: processes, mounts, cgroups, interfaces, state."""

import os


def _cgroups():
    found = set()
    for path, directories, _ in os.walk("/sys/fs/cgroup"):
        found |= {os.path.join(path, name) for name in directories}
    return found


def _processes(mark):
    """Processes with this in their environment or command line; others come and go for reasons of their own."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as command:
                if int(pid) != os.getpid() and mark in environ.read() + command.read():
                    found.add(f"process {pid}")
        except OSError:
            # It has ended.
            continue
    return found


def now(root, mark):
    """All that there is; `mark` is what the environment of every process of the sandboxes has."""
    with open("/proc/self/mountinfo") as mounts:
        found = {f"mount {line.split()[4]}" for line in mounts if root in line}
    found |= {f"cgroup {path}" for path in _cgroups() if mark in path}
    found |= {f"interface {name}" for name in os.listdir("/sys/class/net")}
    found |= {f"state {name}" for name in os.listdir(root)}
    return found | _processes(mark.encode())
