//! What QEMU is told.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use sandbox_vmm_api::{DiskConfig, MachineChoice, NetConfig, TapSource, VmConfig, VsockConfig};

use super::super::open::Inherited;
use super::{Guest, kernel_command_line, qemu};
use crate::config::Config;

fn wire() -> VmConfig {
    VmConfig {
        machine: MachineChoice::Qemu,
        kernel: "/boot/kernel".into(),
        image: "/boot/image".into(),
        memory_mib: 128,
        vcpus: 1,
        cmdline: String::new(),
        vsock: None,
        shares: Vec::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        balloon: false,
        console: None,
        control_socket: "/run/control".into(),
        rates: Default::default(),
        ids: None,
        writable_later: false,
    }
}

const GUEST: Guest = Guest { panic_log: 0x7fe_0000, tsc_khz: Some(2_600_001) };

/// The arguments of a machine, and the descriptors that QEMU inherits for it.
fn arguments(wire: VmConfig) -> (Vec<String>, Vec<String>) {
    let files: Vec<File> = (0..7).map(|_| File::open("/dev/null").unwrap()).collect();
    let fd = |index: usize| files[index].as_fd();
    let config = Config::check(wire).unwrap();
    let inherited = Inherited {
        entry: fd(1),
        memory: fd(2),
        qmp: fd(3),
        console: config.console().map(|_| fd(4)),
        vsock: config.vsock().map(|_| fd(5)),
        share: (!config.shares().is_empty()).then(|| fd(6)),
        disks: config.disks().iter().map(|_| fd(4)).collect(),
        taps: config.nets().iter().map(|_| fd(6)).collect(),
    };
    let fds = inherited.all().iter().map(|fd| fd.as_raw_fd().to_string()).collect();
    (qemu(&config, &inherited), fds)
}

/// The values of an option.
fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
    let pairs = arguments.windows(2).filter(|pair| pair[0] == option);
    pairs.map(|pair| pair[1].as_str()).collect()
}

#[test]
fn the_least_machine_has_nothing_that_was_not_asked_for() {
    let (arguments, fds) = arguments(wire());
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot", "-S", "-sandbox"] {
        assert!(arguments.iter().any(|argument| argument == flag), "{flag}");
    }
    assert_eq!(values(&arguments, "-serial"), [""; 0]);
    assert_eq!(values(&arguments, "-drive"), [""; 0]);
    assert_eq!(
        values(&arguments, "-device"),
        ["isa-debug-exit,iobase=0x501,iosize=1", "virtio-rng-device,rng=entropy"]
    );
    assert!(values(&arguments, "-M")[0].contains("isa-serial=off"));
    assert_eq!(fds.len(), 3);
}

#[test]
fn the_kernel_is_told_of_its_clock_its_timer_and_the_place_for_its_last_words() {
    let words = |wire| kernel_command_line(&Config::check(wire).unwrap(), &GUEST).unwrap();
    let one = words(wire());
    assert!(one.contains(" ramoops.mem_address=0x7fe0000 "), "{one}");
    assert!(one.contains(" tsc_early_khz=2600001"), "{one}");
    assert!(one.contains(" nolapic_timer"), "{one}");
    assert!(one.contains(" quiet ") && !one.contains("console="), "{one}");
    let several = words(VmConfig { vcpus: 2, cmdline: "more words".to_owned(), ..wire() });
    assert!(!several.contains("nolapic_timer"), "{several}");
    assert!(several.contains(" more words virtio_mmio.device="), "{several}");
    assert!(words(VmConfig { console: Some("/c".into()), ..wire() }).contains(" console=ttyS0 "));
}

#[test]
fn everything_is_passed_by_descriptor() {
    let disk = |read_only| DiskConfig { path: "/secret,path".into(), read_only };
    let full = VmConfig {
        vsock: Some(VsockConfig { cid: 3, socket: "/run/vsock".into() }),
        disks: vec![disk(true), disk(false)],
        nets: vec![NetConfig {
            tap: TapSource::Name("tap0".to_owned()),
            mac: "02:00:00:00:00:0a".to_owned(),
        }],
        balloon: true,
        console: Some("/secret,path".into()),
        ..wire()
    };
    let (arguments, fds) = arguments(full);
    assert!(!arguments.iter().any(|argument| argument.contains("secret") || argument.contains("/boot/")));
    let drives = values(&arguments, "-drive");
    assert!(drives[0].contains("/dev/fdset/1,") && drives[0].contains(",readonly=on,"), "{}", drives[0]);
    assert!(drives[1].contains("/dev/fdset/2,") && drives[1].contains(",readonly=off,"), "{}", drives[1]);
    assert!(drives.iter().all(|drive| drive.contains("format=raw")));
    let devices = values(&arguments, "-device").join(" ");
    assert!(devices.contains("virtio-net-device,netdev=net0,mac=02:00:00:00:00:0a"), "{devices}");
    assert!(devices.contains("vhost-user-vsock-device,chardev=vsock"), "{devices}");
    assert!(devices.contains("virtio-balloon-device,free-page-reporting=on"), "{devices}");
    for fd in fds {
        let named = |argument: &String| {
            argument.contains(&format!("fd={fd}")) || argument.contains(&format!("fd/{fd}"))
        };
        assert!(arguments.iter().any(named), "descriptor {fd} is not used");
    }
}

#[test]
fn the_kernel_is_told_of_each_device_from_the_last_place_on() {
    let with_disks = |count| {
        let disks = vec![DiskConfig { path: "/d".into(), read_only: true }; count];
        kernel_command_line(&Config::check(VmConfig { disks, ..wire() }).unwrap(), &GUEST)
    };
    let line = with_disks(1).unwrap();
    assert!(
        line.ends_with(" virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11"),
        "{line}"
    );
    assert!(with_disks(7).unwrap().ends_with(" virtio_mmio.device=512@0xfeb00000:5"));
    let error = with_disks(8).unwrap_err().to_string();
    assert!(error.contains("9 devices") && error.contains("room for 8"), "{error}");
}

/// The kernel reads 2,047 bytes (`COMMAND_LINE_SIZE`, less its end).
#[test]
fn the_longest_words_that_can_be_asked_for_are_not_cut_off() {
    let crowded = |length| VmConfig {
        cmdline: "x".repeat(length),
        disks: vec![DiskConfig { path: "/d".into(), read_only: true }; 7],
        console: Some("/c".into()),
        ..wire()
    };
    let longest = (0..2048).rev().find_map(|length| Config::check(crowded(length)).ok()).unwrap();
    let line = kernel_command_line(&longest, &GUEST).unwrap();
    assert!((1024..2048).contains(&line.len()), "{} bytes", line.len());
}
