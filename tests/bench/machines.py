"""Starts a guest up to the point where its agent is ready: the same kernel and image in sandbox-vmm and in QEMU.

Ready means that the agent's first frame has been read from the control connection that it dials.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time

KERNEL = os.environ["SANDBOX_KERNEL"]
IMAGE = os.environ["SANDBOX_IMAGE"]
VMM = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox-vmm")
MEMORY_MIB = 256
CONTROL_PORT = 1024
EVENT_FD = 3
PATIENCE_SECONDS = 120

# Taken before anything else can get this number. The event socket is put there before a VMM is started, not between
# fork and exec: that would cost a copy of this interpreter, which QEMU's start does not pay for.
os.dup2(os.open("/dev/null", os.O_RDWR), EVENT_FD)


class NotReady(Exception):
    """The guest did not get there."""


def wait_for_hello(listener):
    """Accepts the agent's connection and reads its first frame."""
    listener.settimeout(PATIENCE_SECONDS)
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(PATIENCE_SECONDS)
        length = struct.unpack("<I", read_exactly(connection, 4))[0]
        return json.loads(read_exactly(connection, length))


def read_exactly(connection, length):
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise NotReady("the agent closed its connection")
        data += piece
    return data


def end(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def sandbox_vmm():
    """Milliseconds from starting sandbox-vmm to ready, with the agent's greeting."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        os.mkdir(f"{directory}/vsock")
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(f"{directory}/vsock/vsock.sock_{CONTROL_PORT}")
        listener.listen()
        events, theirs = socket.socketpair()
        stack.enter_context(events)
        config = {
            "machine": "kvm", "kernel": KERNEL, "image": IMAGE, "memory_mib": MEMORY_MIB, "vcpus": 1,
            "vsock": {"cid": 3, "socket": f"{directory}/vsock/vsock.sock"}, "balloon": False,
            "control_socket": f"{directory}/control.sock",
        }
        request = json.dumps(config).encode()

        os.dup2(theirs.fileno(), EVENT_FD)
        began = time.monotonic()
        process = subprocess.Popen([VMM], stdin=subprocess.PIPE, pass_fds=(EVENT_FD,))
        try:
            theirs.close()
            process.stdin.write(request)
            process.stdin.close()
            hello = wait_for_hello(listener)
            return (time.monotonic() - began) * 1000, hello
        finally:
            end(process)


# The words of our own VMM that have to do with speed, less those about devices that only it has.
QEMU_WORDS = "panic=-1 reboot=t random.trust_cpu=on quiet noreplace-smp 8250.nr_uarts=0"


def qemu(cid):
    """Milliseconds from starting QEMU to ready, on its fastest board and with vhost-vsock in the kernel."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    with listener:
        listener.bind((socket.VMADDR_CID_ANY, CONTROL_PORT))
        listener.listen()
        arguments = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off", "-accel", "kvm", "-cpu", "host",
            "-m", f"{MEMORY_MIB}M", "-global", "virtio-mmio.force-legacy=false",
            "-kernel", KERNEL, "-initrd", IMAGE, "-append", QEMU_WORDS,
            "-device", f"vhost-vsock-device,guest-cid={cid}", "-device", "virtio-rng-device",
        ]
        began = time.monotonic()
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        try:
            hello = wait_for_hello(listener)
            return (time.monotonic() - began) * 1000, hello
        finally:
            end(process)
