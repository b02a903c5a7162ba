//! QEMU's command line, and the guest kernel's.

use std::os::fd::{AsRawFd, BorrowedFd};

use sandbox_vmm_api::{POWER_OFF_PORT, RateLimit};

use super::error::Error;
use super::open::Inherited;
use crate::config::Config;
use crate::panic_log;

/// The CPU of the guest: all that TCG can emulate, but for fast `rep movsb`, which TCG does byte by byte and
/// which Linux and glibc would copy with if they were told of it.
const CPU: &str = "max,-erms";

/// Host memory for translated code, in MiB. The default is a quarter of the guest's memory, at most 1 GiB.
const TRANSLATION_BUFFER_MIB: u32 = 64;

/// What the guest kernel is told, for speed unless said otherwise.
///
/// - `panic=-1 reboot=t`: a panic becomes a triple fault at once, which QEMU reports as a reset;
/// - `mitigations=off`: TCG does not speculate, and the guest's own users are not the border here;
/// - `noreplace-smp`: patching code that is translated already makes TCG translate it again;
/// - `tsc=reliable no_timer_check`: no time is spent on checking clocks;
/// - `swiotlb=noforce`: no bounce buffer, which no device needs;
/// - `random.trust_cpu=on`: the pool is seeded at once;
/// - `init_on_alloc=1`: not for speed. Our half of the file system's device writes what is read into the guest's memory
///   behind the back of TCG, which goes on executing what it translated of a page's last user, unless the guest has
///   written to the page since. So the guest clears each page before it is used anew.
const KERNEL_WORDS: &str = "panic=-1 reboot=t mitigations=off noreplace-smp tsc=reliable no_timer_check \
                            swiotlb=noforce random.trust_cpu=on init_on_alloc=1";

/// For one vCPU: calibrating the timer of its local APIC takes 0.2 s, and the other timer does as well. With
/// several vCPUs only that timer ticks for each of them finely.
const KERNEL_WORDS_OF_ONE_CPU: &str = "nolapic_timer";

/// The board's places for virtio devices: how many there are, where the first of them is, how far apart they are, and
/// its interrupt line.
pub const MAX_DEVICES: usize = 8;
const DEVICES_START: usize = 0xfeb0_0000;
const DEVICE_BYTES: usize = 512;
const FIRST_LINE: usize = 5;

/// What the guest's kernel has to be told of its machine.
pub struct Guest {
    /// Where its last words go.
    pub panic_log: u64,
    /// How fast its time stamp counter runs, if it runs steadily.
    pub tsc_khz: Option<u64>,
}

/// QEMU's arguments for a machine.
pub fn qemu(config: &Config, fds: &Inherited<'_>) -> Vec<String> {
    let mut arguments = Arguments::default();
    machine(&mut arguments, config, fds);
    entry(&mut arguments, fds);
    vhost_user_devices(&mut arguments, config, fds);
    plain_devices(&mut arguments, config, fds);
    arguments.0
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.flag(name);
        self.0.push(value.into());
    }
}

/// The board, its memory, and QEMU's own behaviour.
fn machine(arguments: &mut Arguments, config: &Config, fds: &Inherited<'_>) {
    for flag in ["-no-user-config", "-nodefaults", "-no-reboot", "-S"] {
        arguments.flag(flag);
    }
    arguments.option("-display", "none");
    arguments.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    // The interrupt controller and timer of old have to stay, and without a clock to read the kernel waits 2 s for
    // one.
    let serial = if config.console().is_some() { "on" } else { "off" };
    arguments.option(
        "-M",
        format!("microvm,acpi=off,rtc=on,isa-serial={serial},auto-kernel-cmdline=off,memory-backend=memory"),
    );
    arguments.option("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_BUFFER_MIB}"));
    arguments.option("-cpu", CPU);
    arguments.option("-smp", config.vcpus().to_string());
    let memory = config.memory_bytes();
    arguments.option("-m", format!("{}M", memory >> 20));
    let memory_file = descriptor_path(fds.memory);
    arguments.option(
        "-object",
        format!("memory-backend-file,id=memory,size={memory},share=on,mem-path={memory_file}"),
    );
    arguments.option("-chardev", format!("socket,id=qmp,fd={}", fds.qmp.as_raw_fd()));
    arguments.option("-mon", "chardev=qmp,mode=control");
    arguments.option("-device", format!("isa-debug-exit,iobase={POWER_OFF_PORT:#x},iosize=1"));
    arguments.option("-global", "virtio-mmio.force-legacy=false");
}

/// What is booted, and where its console goes.
fn entry(arguments: &mut Arguments, fds: &Inherited<'_>) {
    arguments.option("-kernel", descriptor_path(fds.entry));
    if let Some(fd) = fds.console {
        arguments.option("-chardev", format!("socket,id=console,fd={}", fd.as_raw_fd()));
        arguments.option("-serial", "chardev:console");
    }
}

/// The devices whose other half is in this process.
fn vhost_user_devices(arguments: &mut Arguments, config: &Config, fds: &Inherited<'_>) {
    if let (Some(_), Some(fd)) = (config.vsock(), fds.vsock) {
        arguments.option("-chardev", format!("socket,id=vsock,fd={}", fd.as_raw_fd()));
        arguments.option("-device", "vhost-user-vsock-device,chardev=vsock");
    }
    if let Some(fd) = fds.share {
        arguments.option("-chardev", format!("socket,id=share,fd={}", fd.as_raw_fd()));
        let tag = sandbox_vmm_api::SHARE_TAG;
        let size = crate::fs::QUEUE_SIZE;
        arguments
            .option("-device", format!("vhost-user-fs-device,chardev=share,tag={tag},queue-size={size}"));
    }
}

/// The devices that QEMU has whole.
fn plain_devices(arguments: &mut Arguments, config: &Config, fds: &Inherited<'_>) {
    for (index, (disk, fd)) in config.disks().iter().zip(&fds.disks).enumerate() {
        let set = index + 1;
        let read_only = if disk.read_only { "on" } else { "off" };
        arguments.option("-add-fd", format!("fd={},set={set}", fd.as_raw_fd()));
        // The format is stated, never guessed; the image is locked by its descriptor already.
        arguments.option(
            "-drive",
            format!(
                "id=disk{index},if=none,format=raw,file.driver=file,file.filename=/dev/fdset/{set},\
                 file.locking=off,file.auto-read-only=off,readonly={read_only},discard=unmap{}",
                throttling(config.rates().disks)
            ),
        );
        arguments.option("-device", format!("virtio-blk-device,drive=disk{index}"));
    }
    for (index, (net, fd)) in config.nets().iter().zip(&fds.taps).enumerate() {
        let [a, b, c, d, e, f] = net.mac.0;
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        arguments.option("-netdev", format!("tap,id=net{index},fd={}", fd.as_raw_fd()));
        arguments.option("-device", format!("virtio-net-device,netdev=net{index},mac={mac}"));
    }
    arguments.option("-object", "rng-builtin,id=entropy");
    arguments.option("-device", "virtio-rng-device,rng=entropy");
    if config.balloon() {
        arguments.option("-device", "virtio-balloon-device,free-page-reporting=on");
    }
}

/// What QEMU is told of a limit of a disk.
fn throttling(limit: RateLimit) -> String {
    let operations = limit.operations_per_second.map(|rate| format!(",throttling.iops-total={rate}"));
    let bytes = limit.bytes_per_second.map(|rate| format!(",throttling.bps-total={rate}"));
    [operations, bytes].into_iter().flatten().collect()
}

/// The guest kernel's command line, or an error: there are too many devices.
pub fn kernel_command_line(config: &Config, guest: &Guest) -> Result<String, Error> {
    let console = match config.console() {
        Some(_) => "console=ttyS0 ignore_loglevel",
        // Without a port, a character of a panic is three accesses to nowhere.
        None => "quiet 8250.nr_uarts=0",
    };
    let mut line = format!("{KERNEL_WORDS} {console} {}", panic_log::words(guest.panic_log));
    if config.vcpus() == 1 {
        line.push(' ');
        line.push_str(KERNEL_WORDS_OF_ONE_CPU);
    }
    if let Some(khz) = guest.tsc_khz {
        line.push_str(&format!(" tsc_early_khz={khz}"));
    }
    if !config.cmdline().is_empty() {
        line.push(' ');
        line.push_str(config.cmdline());
    }
    line.push_str(&devices(config.device_count())?);
    Ok(line)
}

/// Where the devices are, in the order of the arguments: without ACPI, the kernel has to be told. QEMU gives each the last
/// place that is free.
fn devices(count: usize) -> Result<String, Error> {
    let device = |number: usize| {
        let place = MAX_DEVICES.checked_sub(number + 1).ok_or(Error::TooManyDevices(count))?;
        let (address, line) = (DEVICES_START + place * DEVICE_BYTES, FIRST_LINE + place);
        Ok(format!(" virtio_mmio.device={DEVICE_BYTES}@{address:#x}:{line}"))
    };
    (0..count).map(device).collect()
}

/// A descriptor that QEMU inherits, as a path.
fn descriptor_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
#[path = "arguments_tests.rs"]
mod tests;
