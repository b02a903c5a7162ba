"""In the lab: TCP between guest and host, by turns in sandbox-vmm and in QEMU, with the same kernel, the same guest, the
same tap and the same program on the host. Then, in ours alone, a GiB there and back, with a checksum.

    network.py ROUNDS MEBIBYTES

QEMU's device is the one that QEMU serves itself, as ours is (vhost=off).
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import figures
import machines

TAP = "bench0"
HOST, GUEST = "192.0.2.1", "192.0.2.2"
READY, FROM_GUEST, TO_GUEST, ECHO = 5000, 5001, 5002, 7
BLOCK = 1 << 16
EXCHANGES = 500
BACK_AND_FORTH_MIB = 1024

# The guest says that it is ready, sends, receives, and echoes whatever comes.
INIT = f"""#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
ip addr add {GUEST}/24 dev eth0
ip link set eth0 up
nc -ll -p {ECHO} -e cat &
nc {HOST} {READY} </dev/null
nc {HOST} {FROM_GUEST} -e dd if=/dev/zero bs={BLOCK} count=$COUNT
nc {HOST} {TO_GUEST} -e dd of=/dev/null bs={BLOCK}
sleep 100000
"""

rounds, mebibytes = int(sys.argv[1]), int(sys.argv[2])


def make_initramfs(path):
    with tempfile.TemporaryDirectory() as root:
        for name in ("bin", "dev", "proc"):
            os.mkdir(f"{root}/{name}")
        shutil.copy2("bundle/rootfs/bin/busybox", f"{root}/bin/busybox")
        for name in ("cat", "dd", "ip", "mount", "nc", "sh", "sleep"):
            os.symlink("busybox", f"{root}/bin/{name}")
        with open(f"{root}/init", "w") as init:
            init.write(INIT.replace("$COUNT", str((mebibytes << 20) // BLOCK)))
        os.chmod(f"{root}/init", 0o755)
        with open(path, "wb") as image:
            subprocess.run("find . | busybox cpio -o -H newc", shell=True, cwd=root, check=True, stdout=image,
                           stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def tap():
    """A tap of the lab's, which outlives the machines."""
    ip = lambda *words: subprocess.run(["ip", *words], check=True)
    ip("tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
    try:
        ip("addr", "add", f"{HOST}/24", "dev", TAP)
        ip("link", "set", TAP, "up")
        yield
    finally:
        ip("link", "delete", TAP)


@contextlib.contextmanager
def sandbox_vmm(image):
    with tempfile.TemporaryDirectory() as directory:
        events, theirs = socket.socketpair()
        config = {"machine": "kvm", "kernel": machines.KERNEL, "image": image, "memory_mib": machines.MEMORY_MIB,
                  "vcpus": 1, "balloon": False, "control_socket": f"{directory}/control.sock",
                  "nets": [{"tap": TAP, "mac": "02:00:00:00:00:02"}]}
        os.dup2(theirs.fileno(), machines.EVENT_FD)
        with events:
            process = subprocess.Popen([machines.VMM], stdin=subprocess.PIPE, pass_fds=(machines.EVENT_FD,))
            theirs.close()
            process.stdin.write(json.dumps(config).encode())
            process.stdin.close()
            try:
                yield
            finally:
                machines.end(process)


@contextlib.contextmanager
def qemu(image):
    arguments = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off", "-accel", "kvm", "-cpu", "host",
        "-m", f"{machines.MEMORY_MIB}M", "-global", "virtio-mmio.force-legacy=false",
        "-kernel", machines.KERNEL, "-initrd", image, "-append", machines.QEMU_WORDS,
        "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off",
        "-device", "virtio-net-device,netdev=n,mac=02:00:00:00:00:02", "-device", "virtio-rng-device",
    ]
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        machines.end(process)


def listen(port):
    listener = socket.create_server((HOST, port))
    listener.settimeout(machines.PATIENCE_SECONDS)
    return listener


def accept(listener):
    connection, _ = listener.accept()
    connection.settimeout(machines.PATIENCE_SECONDS)
    return connection


def dial():
    connection = socket.create_connection((GUEST, ECHO), machines.PATIENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def received(connection):
    """Seconds from now to the end of what comes, and how much that is."""
    buffer = bytearray(1 << 20)
    began, count = time.monotonic(), 0
    while piece := connection.recv_into(buffer):
        count += piece
    return time.monotonic() - began, count


def measure(machine, image):
    """Of one guest: seconds from the guest, seconds to it, and microseconds of an exchange of one byte."""
    with listen(READY) as ready, listen(FROM_GUEST) as source, listen(TO_GUEST) as sink, machine(image):
        accept(ready).close()
        with accept(source) as connection:
            out, count = received(connection)
        if count != mebibytes << 20:
            raise machines.NotReady(f"{count} bytes came from the guest")
        with accept(sink) as connection:
            block = bytes(1 << 20)
            began = time.monotonic()
            for _ in range(mebibytes):
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)
            received(connection)
            into = time.monotonic() - began
        with dial() as connection:
            exchange(connection)
            began = time.monotonic()
            for _ in range(EXCHANGES):
                exchange(connection)
            return out, into, (time.monotonic() - began) / EXCHANGES * 1e6


def exchange(connection):
    connection.sendall(b"x")
    if connection.recv(1) != b"x":
        raise machines.NotReady("the guest does not echo")


def there_and_back(size):
    """Sends that many mebibytes, which come back meanwhile. Returns whether they were the same."""
    sums = [hashlib.blake2b(), hashlib.blake2b()]
    with dial() as connection:
        def send():
            block = bytearray(os.urandom(1 << 20))
            for number in range(size):
                block[:8] = number.to_bytes(8, "little")
                sums[0].update(block)
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        buffer = bytearray(1 << 20)
        while count := connection.recv_into(buffer):
            sums[1].update(memoryview(buffer)[:count])
        sender.join()
    return sums[0].digest() == sums[1].digest()


def in_ours_alone(image, size):
    with listen(READY) as ready, listen(FROM_GUEST) as source, listen(TO_GUEST) as sink, sandbox_vmm(image):
        accept(ready).close()
        with accept(source) as connection:
            received(connection)
        accept(sink).close()
        began = time.monotonic()
        same = there_and_back(size)
        figures.report(f"kvm: TCP, {size} MiB there and back, wrong", 0 if same else 1, "", 0,
                       f"{time.monotonic() - began:.1f} s")
        if not same:
            sys.exit(1)


with tempfile.TemporaryDirectory() as directory, tap():
    image = f"{directory}/image"
    make_initramfs(image)
    ours, theirs = [], []
    for turn in range(rounds + 1):
        figures.note(f"network {turn} of {rounds}")
        for machine, figures_of in ((sandbox_vmm, ours), (qemu, theirs)):
            figure = measure(machine, image)
            # The first turn reads both programs into the page cache.
            if turn > 0:
                figures_of.append(figure)
    for place, what in ((0, "from guest to host"), (1, "from host to guest")):
        speeds = [[mebibytes / figure[place] for figure in of] for of in (ours, theirs)]
        ratio = statistics.median(speeds[0]) / statistics.median(speeds[1])
        verdict = "met" if ratio >= 1 else "MISSED"
        figures.report(f"kvm: TCP {what}, ours to QEMU's", ratio, "", None,
                       f"target 1 or more: {verdict}, ours {figures.spread(speeds[0], 'MiB/s')}, "
                       f"theirs {figures.spread(speeds[1], 'MiB/s')}")
    figures.report_ratio("kvm: TCP latency, ours to QEMU's", [figure[2] for figure in ours],
                         [figure[2] for figure in theirs], 1.0, "us")
    in_ours_alone(image, min(BACK_AND_FORTH_MIB, mebibytes * 8))
