"""In the lab: files over virtio-fs, by turns in a sandbox and in QEMU with virtiofsd, same kernel, warm cache.

The guest times itself by /proc/uptime, which starts no program. QEMU's guest has the same busybox as /init.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

import figures
import machines

SANDBOX = os.path.join(os.environ["SANDBOX_BIN_DIR"], "sandbox")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
MEMORY_MIB = 1024
READ_BYTES = 1 << 30
SMALL_FILES = 20_000
MARK = "bench-seconds"

# What both guests run: $1 is the directory to work in.
WORK = f"""
now() {{ read -r up _ </proc/uptime; echo $up; }}
cd "$1"
began=$(now); cat large >/dev/null; ended=$(now)
echo {MARK} read $began $ended
mkdir unpacked
began=$(now); tar -x -f small.tar -C unpacked; ended=$(now)
echo {MARK} unpack $began $ended
"""

QEMU_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t virtiofs share /share
sh /work.sh /share/data
echo done >/share/done
sync
sleep 1000
"""


def make_bundle(directory):
    """The lab's busybox bundle with the files to work on in /data."""
    # `cp -a` keeps busybox's many names one file, which copytree would not.
    subprocess.run(["cp", "-a", "bundle", directory], check=True)
    data = pathlib.Path(directory, "rootfs/data")
    data.mkdir()
    with open(data / "large", "wb") as large:
        block = os.urandom(1 << 20)
        for _ in range(READ_BYTES >> 20):
            large.write(block)
    with tarfile.open(data / "small.tar", "w") as archive, tempfile.NamedTemporaryFile() as content:
        content.write(b"x" * 3000)
        content.flush()
        for number in range(SMALL_FILES):
            archive.add(content.name, f"{number // 200}/{number}", recursive=False)
    (data / "work.sh").write_text(WORK)
    return data


def forget(data):
    shutil.rmtree(data / "unpacked", ignore_errors=True)


def seconds(output):
    """What the guest's output says of each piece of work."""
    found = {}
    for line in output.splitlines():
        if line.startswith(MARK):
            _, name, began, ended = line.split()
            found[name] = float(ended) - float(began)
    if set(found) != {"read", "unpack"}:
        raise machines.NotReady(f"the guest's work did not end: {output!r}")
    return found


def in_sandbox(bundle):
    command = [SANDBOX, "run", "--machine", "kvm", "--persist", "--memory", f"{MEMORY_MIB}M", bundle, "--",
               "sh", "/data/work.sh", "/data"]
    return seconds(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make_initramfs(bundle, path):
    """An initramfs with the bundle's busybox and the work."""
    with tempfile.TemporaryDirectory() as root:
        for name in ("bin", "dev", "proc", "share"):
            os.mkdir(f"{root}/{name}")
        shutil.copy2(f"{bundle}/rootfs/bin/busybox", f"{root}/bin/busybox")
        for name in ("cat", "mount", "sh", "sleep", "sync", "tar"):
            os.symlink("busybox", f"{root}/bin/{name}")
        pathlib.Path(root, "work.sh").write_text(WORK)
        pathlib.Path(root, "init").write_text(QEMU_INIT)
        os.chmod(f"{root}/init", 0o755)
        with open(path, "wb") as image:
            subprocess.run("find . | busybox cpio -o -H newc", shell=True, cwd=root, check=True, stdout=image,
                           stderr=subprocess.DEVNULL)


def in_qemu(bundle, image):
    with tempfile.TemporaryDirectory() as directory:
        server_socket, console = f"{directory}/fs.sock", f"{directory}/console"
        done = pathlib.Path(bundle, "rootfs/done")
        done.unlink(missing_ok=True)
        server = subprocess.Popen([VIRTIOFSD, f"--socket-path={server_socket}", "-o", f"source={bundle}/rootfs",
                                   "-o", "cache=auto"], stderr=subprocess.DEVNULL)
        while not os.path.exists(server_socket):
            time.sleep(0.05)
        machine = subprocess.Popen([
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,memory-backend=memory",
            "-accel", "kvm", "-cpu", "host", "-m", f"{MEMORY_MIB}M", "-global", "virtio-mmio.force-legacy=false",
            "-object", f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on",
            "-kernel", machines.KERNEL, "-initrd", image, "-append", "panic=-1 reboot=t quiet console=ttyS0",
            "-serial", f"file:{console}", "-chardev", f"socket,id=fs,path={server_socket}",
            "-device", "vhost-user-fs-device,chardev=fs,tag=share,queue-size=1024",
        ], stdin=subprocess.DEVNULL)
        try:
            while not done.exists():
                if machine.poll() is not None:
                    raise machines.NotReady(pathlib.Path(console).read_text(errors="replace")[-2000:])
                time.sleep(0.2)
            return seconds(pathlib.Path(console).read_text(errors="replace").replace("\r", ""))
        finally:
            machines.end(machine)
            machines.end(server)


rounds = int(sys.argv[1])
with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
    bundle, image = f"{directory}/bundle", f"{directory}/initramfs"
    figures.note("making the files")
    data = make_bundle(bundle)
    make_initramfs(bundle, image)
    results = {"read": ([], []), "unpack": ([], [])}
    for turn in range(1, rounds + 1):
        for side, measure in enumerate((lambda: in_sandbox(bundle), lambda: in_qemu(bundle, image))):
            forget(data)
            # Warm: the files to read are in the host's page cache.
            pathlib.Path(data, "large").read_bytes()
            found = measure()
            figures.note(f"files {turn} of {rounds}, {('sandbox', 'QEMU with virtiofsd')[side]}: {found}")
            for name, value in found.items():
                results[name][side].append(value)
figures.report_ratio("read of 1 GiB over virtio-fs, to QEMU with virtiofsd", *results["read"], 1.0, "s")
figures.report_ratio("tar x of 20,000 files, to QEMU with virtiofsd", *results["unpack"], 1.0, "s")
