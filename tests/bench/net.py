"""In the lab: the network, by turns in a sandbox and in QEMU, same kernel and busybox, over the same kind of tap.

Both guests are at the end of a veth pair, joined with their tap by the same filters. The host has the clock: bulk data
from its first byte to the end of the connection, and the time of echo requests, which the guest's kernel answers.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import figures
import machines

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")
NAMESPACE, OUTSIDE = "bench", "bench0"
HOST, GUEST = "198.18.0.1", "198.18.0.2"
OUT_PORT, IN_PORT = 5000, 5001
MEBIBYTES = 256
ECHOES = 200

# What both guests run once they have their address.
WORK = f"""
dd if=/dev/zero bs=64k count={MEBIBYTES * 16} 2>/dev/null | nc {HOST} {OUT_PORT}
nc -l -p {IN_PORT} >/dev/null
"""

QEMU_INIT = f"""#!/bin/sh
ifconfig lo up
ifconfig eth0 {GUEST} netmask 255.255.255.0 up
sh /work.sh
sleep 1000
"""


def ip(line):
    subprocess.run(["ip", *line.split()], check=True)


@contextlib.contextmanager
def namespace():
    """A network namespace with one end of a veth pair, the other being the host's."""
    ip(f"netns add {NAMESPACE}")
    try:
        ip(f"link add {OUTSIDE} type veth peer name eth0 netns {NAMESPACE}")
        ip(f"addr add {HOST}/24 dev {OUTSIDE}")
        ip(f"link set {OUTSIDE} up")
        ip(f"-n {NAMESPACE} addr add {GUEST}/24 dev eth0")
        ip(f"-n {NAMESPACE} link set eth0 up")
        yield json.loads(subprocess.check_output(["ip", "-n", NAMESPACE, "-j", "link", "show", "eth0"]))[0]["address"]
    finally:
        ip(f"netns delete {NAMESPACE}")


def read_to_end(connection):
    """Seconds from the first byte to the end."""
    buffer, began, total = bytearray(1 << 20), None, 0
    while received := connection.recv_into(buffer):
        began = began or time.monotonic()
        total += received
    if total != MEBIBYTES << 20:
        raise machines.NotReady(f"{total} bytes came")
    return time.monotonic() - began


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def is_reply(packet, number):
    """Whether a packet, IP header and all, answers our request with this number."""
    return packet[20] == 0 and packet[24:28] == struct.pack("!HH", 77, number)


def echo_millis():
    """The median time of an echo request."""
    samples = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.settimeout(machines.PATIENCE_SECONDS)
        for number in range(ECHOES):
            request = struct.pack("!BBHHH", 8, 0, 0, 77, number)
            request = struct.pack("!BBHHH", 8, 0, checksum(request), 77, number)
            began = time.monotonic()
            icmp.sendto(request, (GUEST, 0))
            while not is_reply(icmp.recv(256), number):
                pass
            samples.append((time.monotonic() - began) * 1000)
    return statistics.median(samples)


def connect():
    deadline = time.monotonic() + machines.PATIENCE_SECONDS
    while True:
        try:
            return socket.create_connection((GUEST, IN_PORT), timeout=machines.PATIENCE_SECONDS)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def measure(guest):
    """What the guest of a process does, started by `guest`."""
    with socket.create_server((HOST, OUT_PORT)) as listener:
        listener.settimeout(machines.PATIENCE_SECONDS)
        process = guest()
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(machines.PATIENCE_SECONDS)
                out = read_to_end(connection)
            echo = echo_millis()
            with connect() as connection:
                block, began = bytes(1 << 20), time.monotonic()
                for _ in range(MEBIBYTES):
                    connection.sendall(block)
                connection.shutdown(socket.SHUT_WR)
                # The guest closes when it has had everything.
                connection.recv(1)
                inward = time.monotonic() - began
            return {"out": out, "in": inward, "echo": echo}
        finally:
            machines.end(process)


def sandbox(bundle):
    command = [SANDBOX, "run", "--quiet", "--machine", "kvm", bundle, "--", "sh", "-c", WORK]
    return lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL)


def make_bundle(directory):
    subprocess.run(["cp", "-a", "bundle", directory], check=True)
    path = pathlib.Path(directory, "config.json")
    config = json.loads(path.read_text())
    namespaces = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
    config["linux"]["namespaces"] = [*namespaces, {"type": "network", "path": f"/run/netns/{NAMESPACE}"}]
    path.write_text(json.dumps(config))


def make_initramfs(bundle, path):
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/bin")
        os.mkdir(f"{root}/dev")
        shutil.copy2(f"{bundle}/rootfs/bin/busybox", f"{root}/bin/busybox")
        for name in ("dd", "ifconfig", "nc", "sh", "sleep"):
            os.symlink("busybox", f"{root}/bin/{name}")
        pathlib.Path(root, "work.sh").write_text(WORK.replace("2>/dev/null", "").replace(">/dev/null", ">/null"))
        pathlib.Path(root, "init").write_text(QEMU_INIT)
        os.chmod(f"{root}/init", 0o755)
        subprocess.run(["mknod", f"{root}/null", "c", "1", "3"], check=True)
        subprocess.run(["mknod", f"{root}/dev/zero", "c", "1", "5"], check=True)
        subprocess.run(["mknod", f"{root}/dev/console", "c", "5", "1"], check=True)
        with open(path, "wb") as image:
            subprocess.run("find . | busybox cpio -o -H newc", shell=True, cwd=root, check=True, stdout=image,
                           stderr=subprocess.DEVNULL)


def join(tap):
    """The filters that a sandbox has, for a tap of QEMU's."""
    for here, there in (("eth0", tap), (tap, "eth0")):
        for line in (f"qdisc add dev {here} ingress",
                     f"filter add dev {here} parent ffff: u32 match u32 0 0 action mirred egress redirect dev {there}"):
            subprocess.run(["tc", "-n", NAMESPACE, *line.split()], check=True)


def part(tap):
    subprocess.run(["tc", "-n", NAMESPACE, "qdisc", "delete", "dev", "eth0", "ingress"], check=True)
    ip(f"-n {NAMESPACE} link delete {tap}")


def qemu(image, tap, mac):
    return lambda: subprocess.Popen([
        "ip", "netns", "exec", NAMESPACE,
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off", "-accel", "kvm", "-cpu", "host",
        "-m", "512M", "-global", "virtio-mmio.force-legacy=false",
        "-kernel", machines.KERNEL, "-initrd", image, "-append", f"{machines.QEMU_WORDS} dummy.numdummies=0",
        "-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no",
        "-device", f"virtio-net-device,netdev=net,mac={mac}",
    ], stdin=subprocess.DEVNULL)


rounds = int(sys.argv[1])
results = {"out": ([], []), "in": ([], []), "echo": ([], [])}
with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, namespace() as mac:
    bundle, image, tap = f"{directory}/bundle", f"{directory}/initramfs", "qemutap0"
    make_bundle(bundle)
    make_initramfs(bundle, image)
    for turn in range(1, rounds + 1):
        for side, name in enumerate(("sandbox", "QEMU")):
            if name == "QEMU":
                ip(f"-n {NAMESPACE} tuntap add {tap} mode tap vnet_hdr")
                ip(f"-n {NAMESPACE} link set {tap} up")
                join(tap)
            try:
                found = measure(sandbox(bundle) if name == "sandbox" else qemu(image, tap, mac))
            finally:
                if name == "QEMU":
                    part(tap)
            figures.note(f"network {turn} of {rounds}, {name}: {found}")
            for what, value in found.items():
                results[what][side].append(value)
            # The end of a killed sandbox is the end of its machine, a moment later.
            time.sleep(2)
figures.report_ratio(f"TCP, {MEBIBYTES} MiB from the guest, to QEMU", *results["out"], 1.0, "s")
figures.report_ratio(f"TCP, {MEBIBYTES} MiB to the guest, to QEMU", *results["in"], 1.0, "s")
figures.report_ratio("echo request to the guest and back, to QEMU", *results["echo"], 1.0)
