//! A guest without an operating system, which attacks devices by itself.
//!
//! Its kernel is a few instructions that carry out a [`Script`]: writes to memory and to registers, waits, reports. The
//! script comes in the place of the guest's image, so that an attack is written in the test, access by access, and
//! nothing between it and the device makes it any politer. It is entered in long mode, as Linux is, and goes back to 32-bit
//! protected mode without paging. It never enables interrupts, and tells what it sees over the serial port.

mod script;
pub mod victim;
mod virtio;

use std::fs;
use std::path::Path;
use std::time::Instant;

use sandbox_vmm_api::{ExitReason, VmConfig};

pub use script::Script;
pub use virtio::{DATA, Descriptor, MEMORY_BYTES, Ring, device, flag, register, status};

use crate::initramfs;
use crate::place::patience;
use crate::process::POLL;
use crate::vmm::{self, Machine};

/// Where the kernel lies in the guest; it starts with its 64-bit entry.
const KERNEL_START: u64 = 16 << 20;

/// What the script is called in the image: the archive's header and this name take [`SCRIPT_OFFSET`] bytes.
const SCRIPT_NAME: &str = "script";
const SCRIPT_OFFSET: usize = 120;

std::arch::global_asm!(include_str!("kernel.s"), offset = const SCRIPT_OFFSET);

unsafe extern "C" {
    static sandbox_bare_start: u8;
    static sandbox_bare_end: u8;
}

/// The instructions of the kernel, which run at any address.
fn code() -> &'static [u8] {
    let (start, end) = (&raw const sandbox_bare_start, &raw const sandbox_bare_end);
    // SAFETY: the names are of one section of read-only data, in this order, with only the kernel in between.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// An ELF image with the kernel, and the note by which a kernel is known, of a PVH entry.
fn kernel() -> Vec<u8> {
    const NOTE_OFFSET: u64 = 0x100;
    const CODE_OFFSET: u64 = 0x1000;
    let code = code();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend(KERNEL_START.to_le_bytes());
    image.extend(64u64.to_le_bytes());
    image.extend([0; 12]);
    for field in [64u16, 56, 2, 64, 0, 0] {
        image.extend(field.to_le_bytes());
    }
    let bytes = code.len() as u64;
    let mut program = |kind: u32, fields: [u64; 6]| {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        image.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    };
    program(1, [CODE_OFFSET, KERNEL_START, KERNEL_START, bytes, bytes, 0x1000]);
    program(4, [NOTE_OFFSET, 0, 0, 24, 24, 4]);
    image.resize(NOTE_OFFSET as usize, 0);
    for field in [4u32, 8, 18] {
        image.extend(field.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(KERNEL_START.to_le_bytes());
    image.resize(CODE_OFFSET as usize, 0);
    image.extend(code);
    image
}

/// Starts a machine that carries out a script and then cuts its power.
///
/// # Panics
///
/// When it cannot be started.
pub fn start(script: Script, change: impl FnOnce(&mut VmConfig, &Path)) -> Machine {
    let mut plan = vmm::plan("bare");
    let directory = plan.directory.path().to_owned();
    let config = &mut plan.config;
    config.kernel = directory.join("bare-kernel");
    config.image = directory.join("bare-image");
    config.console = Some(directory.join("console"));
    config.memory_mib = (MEMORY_BYTES >> 20) as u32;
    fs::write(&config.kernel, kernel()).expect("a kernel can be written");
    initramfs::write_file(&config.image, SCRIPT_NAME, &script.finish()).expect("an image can be written");
    change(config, &directory);
    plan.start()
}

/// What a bare guest has reported so far.
pub fn report(machine: &Machine) -> String {
    let console = machine.plan.config.console.as_ref().expect("a bare machine has a console");
    fs::read_to_string(console).unwrap_or_default()
}

/// Waits until a bare guest has reported this.
///
/// # Panics
///
/// When it does not.
#[track_caller]
pub fn wait_for(machine: &Machine, text: &str) {
    let deadline = Instant::now() + patience();
    while !report(machine).contains(text) {
        assert!(Instant::now() < deadline, "{text:?} was not reported: {:?}", report(machine));
        std::thread::sleep(POLL);
    }
}

/// Runs a script to its end and gives what it reported.
///
/// # Panics
///
/// When the machine ends in another way than by the script's last step.
#[track_caller]
pub fn run(script: Script, change: impl FnOnce(&mut VmConfig, &Path)) -> String {
    let mut machine = start(script, change);
    machine.expect_running();
    let reason = machine.expect_exit();
    let report = report(&machine);
    assert_eq!(reason, ExitReason::PowerOff, "{report}\n{}", machine.end());
    report
}
