"""In the lab: what the jail costs, by turns with a sandbox-vmm that was built without its filters and ids.

The jail itself cannot be left out, since devices name paths in it; what it takes is in the VMM's own timings. Its
network is made while the guest is loaded, and is not in them: 2 ms in the lab, of which 1 is left of a start.
Throughput is measured from the first byte on, so that the start of the machine is no part of it. Of the reads of a file
in one machine the fastest counts: whatever else the lab does only ever adds to them. The lab's own speed drifts by as
much as the half within minutes, so that each run is held against the one next to it, and the median of these ratios is
the figure.
"""

import contextlib
import itertools
import json
import os
import shutil
import socket
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
STREAM_BYTES = 48 << 20
# More than the guest's memory holds.
FILE_BYTES, FILE_READS = 512 << 20, 4
NETWORK_BYTES = 64 << 20
NETWORK = "bench-jail"
HOST_ADDRESS, GUEST_ADDRESS = "10.77.0.1", "10.77.0.2"


def words(bundle, *command):
    return [SANDBOX, "run", "--machine", "kvm", "--timings", bundle, "--", *command]


def run(vmm, *command):
    """Milliseconds of a run, and what it printed on standard error."""
    environment = dict(os.environ, SANDBOX_VMM=vmm)
    began = time.monotonic()
    done = subprocess.run(words(BUNDLE, *command), check=True, env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return (time.monotonic() - began) * 1000, done.stderr


def step(timings, name):
    """The milliseconds of one step of the VMM's start."""
    for line in timings.splitlines():
        parts = line.split()
        if name in line and len(parts) > 2 and parts[-1] == "ms":
            return float(parts[-2])
    raise SystemExit(f"bench: no step {name!r} in the timings:\n{timings}")


def from_the_first_byte(vmm, *command):
    """Milliseconds from the first byte of a command's output to its end."""
    process = subprocess.Popen(words(BUNDLE, *command), env=dict(os.environ, SANDBOX_VMM=vmm),
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    source = process.stdout.fileno()
    os.read(source, 1)
    began = time.monotonic()
    with open("/dev/null", "wb") as null:
        while os.splice(source, null.fileno(), 1 << 20):
            pass
    took = (time.monotonic() - began) * 1000
    if process.wait() != 0:
        raise SystemExit(f"bench: {command} ended with {process.returncode}")
    return took


def fastest_step(vmm, *command):
    """Milliseconds of the fastest step of a command that prints a byte after each; of the first, the beginning is not
    seen."""
    process = subprocess.Popen(words(BUNDLE, *command), env=dict(os.environ, SANDBOX_VMM=vmm), bufsize=0,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    ticks = []
    while process.stdout.read(1):
        ticks.append(time.monotonic())
    if process.wait() != 0:
        raise SystemExit(f"bench: {command} ended with {process.returncode}")
    return min(end - begin for begin, end in itertools.pairwise(ticks)) * 1000


@contextlib.contextmanager
def network():
    """A network namespace with one interface, as an engine makes it, and a bundle that is put into it."""
    for line in [
        f"netns add {NETWORK}",
        f"link add {NETWORK} type veth peer name eth0 netns {NETWORK}",
        f"addr add {HOST_ADDRESS}/24 dev {NETWORK}",
        f"link set {NETWORK} up",
        f"-n {NETWORK} addr add {GUEST_ADDRESS}/24 dev eth0",
        f"-n {NETWORK} link set eth0 up",
    ]:
        subprocess.run(["ip", *line.split()], check=True)
    bundle = "bundle-in-network"
    os.makedirs(bundle, exist_ok=True)
    with open(f"{BUNDLE}/config.json") as old, open(f"{bundle}/config.json", "w") as new:
        config = json.load(old)
        config["root"]["path"] = os.path.abspath(f"{BUNDLE}/rootfs")
        namespaces = [one for one in config["linux"]["namespaces"] if one["type"] != "network"]
        config["linux"]["namespaces"] = [*namespaces, {"type": "network", "path": f"/run/netns/{NETWORK}"}]
        json.dump(config, new)
    try:
        yield bundle
    finally:
        subprocess.run(["ip", "netns", "del", NETWORK], check=True)
        shutil.rmtree(bundle)


def received(vmm, bundle):
    """Milliseconds in which a guest receives bytes from the host over its network."""
    with socket.create_server((HOST_ADDRESS, 0)) as server:
        port = server.getsockname()[1]
        process = subprocess.Popen(words(bundle, "sh", "-c", f"nc {HOST_ADDRESS} {port} | wc -c"),
                                   env=dict(os.environ, SANDBOX_VMM=vmm),
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        server.settimeout(120)
        connection, _ = server.accept()
        with connection:
            chunk = bytes(1 << 20)
            began = time.monotonic()
            for _ in range(NETWORK_BYTES // len(chunk)):
                connection.sendall(chunk)
            connection.shutdown(socket.SHUT_WR)
            got = process.stdout.readline()
            took = (time.monotonic() - began) * 1000
    if process.wait() != 0 or int(got) != NETWORK_BYTES:
        raise SystemExit(f"bench: the guest on the network got {got!r} and ended with {process.returncode}")
    return took


def by_turns(rounds, measure):
    """What each of the two needs. Who begins changes with each round; the first fills the caches, and does not count."""
    confined, unconfined = [], []
    for turn in range(rounds + 1):
        both = [(confined, CONFINED), (unconfined, UNCONFINED)]
        for samples, vmm in both if turn % 2 == 0 else reversed(both):
            samples.append(measure(vmm))
    return confined[1:], unconfined[1:]


def report_throughput(name, confined, unconfined):
    ratios = [without / with_them for without, with_them in zip(unconfined, confined, strict=True)]
    ratio = statistics.median(ratios)
    verdict = "met" if ratio >= 0.98 else "MISSED"
    figures.report(name, ratio, "", None, f"target 0.98 or more: {verdict}, {min(ratios):.2f} to {max(ratios):.2f}, "
                                          f"with: {figures.spread(confined, 'ms')}")


rounds = int(sys.argv[1])
jail = []
for turn in range(rounds):
    figures.note(f"jail {turn} of {rounds}")
    timings = run(CONFINED, "true")[1]
    jail.append(step(timings, "enter the jail") + step(timings, "confine the process"))
figures.report("start: jail, ids and filters of the first thread", statistics.median(jail), "ms", 5,
               figures.spread(jail, "ms"))

confined, unconfined = by_turns(rounds, lambda vmm: run(vmm, "true")[0])
added = statistics.median(confined) - statistics.median(unconfined)
figures.report("start: with filters, more than without", added, "ms", 5, figures.spread(confined, "ms"))

with open(f"{BUNDLE}/rootfs/large", "wb") as large:
    large.truncate(FILE_BYTES)
with open(f"{BUNDLE}/rootfs/large", "rb") as large:
    # Whoever is first would find nothing in the host's page cache.
    while large.read(1 << 20):
        pass
read = "; ".join(["cat /large >/dev/null; echo"] * FILE_READS)
for name, measure, command in [
    ("stream, without filters to with", from_the_first_byte, ["head", "-c", str(STREAM_BYTES), "/dev/zero"]),
    ("file, without filters to with", fastest_step, ["sh", "-c", read]),
]:
    figures.note(name)
    report_throughput(name, *by_turns(rounds, lambda vmm, run=measure, command=command: run(vmm, *command)))
with network() as bundle:
    name = "network to the guest, without filters to with"
    figures.note(name)
    report_throughput(name, *by_turns(rounds, lambda vmm: received(vmm, bundle)))
