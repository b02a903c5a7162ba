"""Containers of the real containerd: `ctr run` over the shim and over runc, by turns; one more container in a pod that
runs; what a shim has resident; 20 pods at once.

    containerd.py BUNDLE MACHINE ROUNDS
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import figures

BINARIES = os.path.abspath(os.environ["SANDBOX_BIN_DIR"])
RUNTIMES = {"sandbox": "io.containerd.sandbox.v2", "runc": "io.containerd.runc.v2"}
IMAGE = "localhost/busybox:latest"
NAMESPACE = f"sandbox-bench-{os.getpid()}"
START_SECONDS = 60
# As many as two emulated processors boot within a shim's patience.
AT_ONCE = {"qemu": 20, "kvm": 8}

bundle, machine, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])


class Containerd:
    """A daemon of its own, with the image of the bundle."""

    def __init__(self, directory):
        self.directory = directory
        self.socket = os.path.join(directory, "sock")
        configuration = os.path.join(directory, "config.toml")
        with open(configuration, "w") as file:
            file.write(f'''version = 2
root = "{directory}/root"
state = "{directory}/run"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{self.socket}"
[ttrpc]
address = "{self.socket}.ttrpc"
''')
        environment = dict(os.environ, SANDBOX_MACHINE=machine, SANDBOX_ROOT=os.path.join(directory, "state"))
        environment["PATH"] = f"{BINARIES}:{os.environ['PATH']}"
        with open(os.path.join(directory, "log"), "w") as log:
            self.daemon = subprocess.Popen(["containerd", "--config", configuration], env=environment, stdout=log,
                                           stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while self.ctr("version", check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"containerd does not answer: see {directory}/log")
            time.sleep(0.05)
        self.import_image()

    def command(self, *words):
        return ["ctr", "--address", self.socket, "--namespace", NAMESPACE, *words]

    def ctr(self, *words, check=True):
        return subprocess.run(self.command(*words), check=check, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)

    def import_image(self):
        image = os.path.join(self.directory, "image")
        os.mkdir(image)
        layer = os.path.join(image, "layer.tar")
        subprocess.run(["tar", "-C", os.path.join(bundle, "rootfs"), "-cf", layer, "."], check=True)
        with open(layer, "rb") as file:
            digest = f"sha256:{hashlib.sha256(file.read()).hexdigest()}"
        config = {"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
                  "rootfs": {"type": "layers", "diff_ids": [digest]}}
        manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
        for name, content in (("config.json", config), ("manifest.json", manifest)):
            with open(os.path.join(image, name), "w") as file:
                json.dump(content, file)
        archive = os.path.join(self.directory, "image.tar")
        subprocess.run(["tar", "-C", image, "-cf", archive, "."], check=True)
        self.ctr("image", "import", archive)

    def run(self, runtime, name, *words, options=()):
        """The command line of a container."""
        return self.command("run", "--runtime", RUNTIMES[runtime], *options, IMAGE, name, *words)

    def end(self, *names):
        for name in names:
            self.ctr("task", "rm", "--force", name, check=False)
            self.ctr("container", "rm", name, check=False)

    def take_down(self):
        for kind in ("task", "container"):
            for name in self.ctr(kind, "ls", "--quiet", check=False).stdout.split():
                self.end(name)
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait()
        for pattern in ("", "*/"):
            for path in glob.glob(f"/sys/fs/cgroup/{pattern}{NAMESPACE}"):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def milliseconds(command):
    began = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return (time.monotonic() - began) * 1000


def by_turns(samples):
    """Takes a sample of each in turn; the first of each reads its files into the page cache."""
    taken = {name: [] for name in samples}
    for turn in range(rounds + 1):
        for name, sample in samples.items():
            value = sample()
            if turn > 0:
                taken[name].append(value)
    return taken


def annotated(annotations):
    """Options that make a container one of a pod, in the words of containerd's service for Kubernetes."""
    return [word for name, value in annotations.items() for word in ("--annotation", f"io.kubernetes.cri.{name}={value}")]


def first_of(pod, memory=None):
    """Options of the first container of a pod, with a machine for so many bytes of its containers."""
    size = {"sandbox-memory": memory} if memory else {}
    return annotated({"sandbox-id": pod, "container-type": "sandbox", **size})


def compare(containerd):
    """The first container and one more in a pod that runs, against containers of runc."""
    probe = containerd.run("runc", "probe", "true", options=["--rm"])
    runs_runc = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    containerd.end("probe")

    first = [*first_of("pod"), "--detach", "--null-io"]
    subprocess.run(containerd.run("sandbox", "pod", "sleep", "1000", options=first), check=True)
    task = containerd.ctr("task", "ps", "pod").stdout.split("\n")[1].split()[0]
    join = [*annotated({"sandbox-id": "pod", "container-type": "container"}), "--with-ns",
            f"network:/proc/{task}/ns/net", "--rm"]
    samples = {
        "alone": lambda: milliseconds(containerd.run("sandbox", "alone", "true", options=["--rm"])),
        "joined": lambda: milliseconds(containerd.run("sandbox", "joined", "true", options=join)),
        "run": lambda: milliseconds([f"{BINARIES}/sandbox", "--root", f"{containerd.directory}/state-of-run", "run",
                                     "--machine", machine, bundle, "--", "true"]),
    }
    if runs_runc:
        samples["runc"] = lambda: milliseconds(containerd.run("runc", "theirs", "true", options=["--rm"]))
    else:
        figures.note("runc does not run here: there is nothing to compare")
    taken = by_turns(samples)
    resident()
    containerd.end("pod")

    for name, what in (("alone", "ctr run --rm of true"), ("joined", "one more container in a pod")):
        figures.report(f"{machine}: {what}", statistics.median(taken[name]), "ms",
                       detail=figures.spread(taken[name], "ms"))
        if runs_runc:
            over = statistics.median(taken[name]) - statistics.median(taken["runc"])
            # Of a container alone, what is ours is a cold start of `sandbox run` at most.
            target = {"alone": statistics.median(taken["run"]), "joined": 100}[name] if machine == "kvm" else None
            figures.report(f"{machine}: {what}, over runc's", over, "ms", target, figures.spread(taken["runc"], "ms"))
    figures.report(f"{machine}: sandbox run of true", statistics.median(taken["run"]), "ms",
                   detail=figures.spread(taken["run"], "ms"))


def resident():
    """What the shim of the pod has resident."""
    found = False
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            with open(path) as file:
                words = file.read().split("\0")
            if words[0].endswith("containerd-shim-sandbox-v2") and NAMESPACE in words and "serve" in words:
                with open(os.path.join(os.path.dirname(path), "status")) as file:
                    kib = next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
                figures.report("resident memory of a shim", kib / 1024, "MiB", 10)
                found = True
    if not found:
        raise RuntimeError("no shim of the pod is found")


def at_once(containerd):
    """Pods that start together."""
    count = AT_ONCE[machine]
    began = time.monotonic()
    runs = [subprocess.Popen(containerd.run("sandbox", f"pod{n}", "true", options=[*first_of(f"pod{n}", 32 << 20), "--rm"]),
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for n in range(count)]
    failed = sum(run.wait() != 0 for run in runs)
    figures.report(f"{machine}: {count} pods at once, failures", failed, "", 0, f"{time.monotonic() - began:.1f} s")


if not all(map(shutil.which, ("containerd", "ctr"))):
    figures.note("SKIPPED: containerd: it is not installed")
    sys.exit(0)
with tempfile.TemporaryDirectory(prefix="sbe-") as directory:
    containerd = Containerd(directory)
    try:
        compare(containerd)
        at_once(containerd)
    finally:
        containerd.take_down()
