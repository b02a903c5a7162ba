"""How long one more process takes in a container that runs: `podman exec` over sandbox and over a runtime without
virtual machines, by turns; and of `sandbox exec`, what is not the guest's own fork and exec, each time measured anew.

    engine.py BUNDLE MACHINE ROUNDS
"""

import contextlib
import glob
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import figures

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")
CGROUP = f"sandbox-bench-{os.getpid()}"
# A process of the guest's shell; the shell itself measures some of them.
FORKS = 20
FORK_SCRIPT = f"""read start rest </proc/uptime; i=0
while [ $i -lt {FORKS} ]; do /bin/busybox true; i=$((i + 1)); done
read end rest </proc/uptime; echo $start $end"""

bundle, machine, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])


def is_on(parameter):
    """Whether a parameter of a kernel module is on."""
    with contextlib.suppress(OSError), open(f"/sys/module/{parameter}") as file:
        return file.read().strip() in ("1", "Y")
    return False


nested = is_on("kvm_amd/parameters/npt") or is_on("kvm_intel/parameters/ept")
title = f"{machine}, {'nested' if nested else 'shadow'} paging" if machine == "kvm" else machine


def milliseconds(command):
    """The life of a process with standard error alone. `subprocess` would add work of its own."""
    path = shutil.which(command[0])
    streams = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1)]
    began = time.monotonic()
    pid = os.posix_spawn(path, command, os.environ, file_actions=streams)
    _, status = os.waitpid(pid, 0)
    taken = (time.monotonic() - began) * 1000
    if status != 0:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return taken


class Podman:
    """Podman with a storage of its own, and one container for each runtime."""

    def __init__(self, directory):
        self.directory = directory
        self.options = ["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        for option in ("root", "runroot", "tmpdir"):
            self.options += [f"--{option}", os.path.join(directory, option)]
        self.wrapper = os.path.join(directory, "sandbox")
        variables = {name: os.environ[name] for name in ("SANDBOX_KERNEL", "SANDBOX_IMAGE") if name in os.environ}
        variables["SANDBOX_MACHINE"] = machine
        exports = " ".join(f"{name}='{value}'" for name, value in variables.items())
        with open(self.wrapper, "w") as file:
            # conmon does not hand its environment down.
            file.write(f'#!/bin/sh\nexport {exports}\nexec {SANDBOX} --root {directory}/state "$@"\n')
        os.chmod(self.wrapper, 0o755)

    def command(self, runtime, *words):
        return ["podman", *self.options, "--runtime", runtime, *words]

    def do(self, runtime, *words):
        return subprocess.run(self.command(runtime, *words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)

    def import_image(self):
        tar = os.path.join(self.directory, "image.tar")
        subprocess.run(["tar", "-C", os.path.join(bundle, "rootfs"), "-cf", tar, "."], check=True)
        self.do(self.wrapper, "import", tar, "localhost/busybox").check_returncode()

    def start(self, name, runtime):
        """Whether there is a container now; why not is said."""
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        done = self.do(runtime, "run", "--detach", "--name", name, "--network", "none", "--cgroup-parent", f"/{CGROUP}",
                       *limits, "localhost/busybox", "sleep", "1000")
        if done.returncode != 0:
            figures.note(f"{name} does not run here: {done.stderr.strip()}")
        return done.returncode == 0

    def take_down(self):
        self.do(self.wrapper, "rm", "--all", "--force", "--time", "0")
        # What a conmon starts at its end mounts the storage once more.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and subprocess.run(["pgrep", "--full", self.directory],
                                                             stdout=subprocess.DEVNULL).returncode == 0:
            time.sleep(0.1)
        # Two that start at once mount it twice.
        while subprocess.run(["umount", "--quiet", os.path.join(self.directory, "root", "overlay")]).returncode == 0:
            pass
        # Podman leaves the parent, and that of its conmons.
        for pattern in ("", "*/"):
            for parent in glob.glob(f"/sys/fs/cgroup/{pattern}{CGROUP}"):
                for path in (os.path.join(parent, "conmon"), parent):
                    with contextlib.suppress(OSError):
                        os.rmdir(path)


def compare(podman):
    """`podman exec` over both, by turns."""
    podman.import_image()
    # crun refuses hosts with both versions of cgroups.
    theirs = next((name for name in ("crun", "runc") if shutil.which(name) and podman.start(name, name)), None)
    if theirs is None or not podman.start("sandbox", podman.wrapper):
        figures.note("SKIPPED: podman exec compared: there is nothing to compare")
        return
    samples = {"sandbox": [], theirs: []}
    for turn in range(rounds + 1):
        for name, runtime in (("sandbox", podman.wrapper), (theirs, theirs)):
            sample = milliseconds(podman.command(runtime, "exec", name, "true"))
            # The first of each reads its files into the page cache.
            if turn > 0:
                samples[name].append(sample)
    figures.report_ratio(f"{title}: podman exec of true, over {theirs}'s", samples["sandbox"], samples[theirs],
                         None)


def by_itself(root):
    """`sandbox exec` without an engine."""
    def sandbox(*words):
        return [SANDBOX, "--root", root, *words]

    subprocess.run(sandbox("run", "--machine", machine, "--detach", "--bundle", bundle, "bench", "--", "sleep", "1000"),
                   check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        forks, samples = [], []
        for turn in range(rounds + 1):
            out = subprocess.run(sandbox("exec", "bench", "sh", "-c", FORK_SCRIPT), check=True,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
            start, end = (float(seconds) for seconds in out.split())
            sample = milliseconds(sandbox("exec", "bench", "true"))
            if turn > 0:
                forks.append((end - start) * 1000 / FORKS)
                samples.append(sample)
        rest = [sample - fork for sample, fork in zip(samples, forks)]
        figures.report(f"{title}: exec of true, the guest's fork+exec off", statistics.median(rest), "ms",
                       30 if machine == "kvm" else None,
                       f"{figures.spread(samples, 'ms')}, fork and exec {statistics.median(forks):.1f} ms")
    finally:
        subprocess.run(sandbox("delete", "--force", "bench"), check=True)


with tempfile.TemporaryDirectory(prefix="sbe-") as directory:
    by_itself(os.path.join(directory, "root-alone"))
    if shutil.which("podman"):
        podman = Podman(directory)
        try:
            compare(podman)
        finally:
            podman.take_down()
    else:
        figures.note("SKIPPED: podman exec compared: Podman is not installed: apt-get install podman crun")
