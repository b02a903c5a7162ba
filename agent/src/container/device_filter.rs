//! Which devices a container may use: a small eBPF program on its cgroup.
//!
//! Version 2 of cgroups has no device files; the kernel asks a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`
//! instead. It gets the kind of device, its numbers and the access wanted, and answers 1 (yes) or 0.
//!
//! The rules of config.json are applied in their order, each to the accesses that it names, and the container's
//! basic devices are allowed after them, as runc does. The program does the same: it keeps the set of allowed
//! accesses in a register, lets every rule that matches add to it or take from it, and says yes when the set
//! holds all that is wanted. Without any rule nothing but the basic devices is allowed.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// The most rules, far more than an engine writes and well below the kernel's limit of instructions.
const MAX_RULES: usize = 1024;

/// The kernel's kinds of device in this program.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// The kernel's accesses in this program.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// Why the rules do not hold.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFilterError {
    /// There are too many.
    #[error("linux.resources.devices has {0} rules, more than {MAX_RULES}")]
    TooMany(usize),
    /// A rule has a letter that is no access.
    #[error("linux.resources.devices[{index}].access is {access:?}, which is not made of r, w and m")]
    Access {
        /// Which rule.
        index: usize,
        /// What it says.
        access: String,
    },
    /// A rule is for something that is no device.
    #[error("linux.resources.devices[{0}].type is none of a, b and c")]
    Type(usize),
    /// A rule has a number that no device has.
    #[error("linux.resources.devices[{0}] has a device number over 2^31")]
    Number(usize),
    /// The kernel refused the program.
    #[error("the guest's kernel refuses the device rules: {0}")]
    Load(std::io::Error),
    /// The kernel refused to use it.
    #[error("the guest's kernel refuses device rules on a cgroup: {0}")]
    Attach(std::io::Error),
}

/// A rule. `None` stands for any.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

const fn allowed(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

const ALL_ACCESS: i32 = MKNOD | READ | WRITE;

/// What every container may use: any node may be made, and the basic devices and terminals used.
const BASIC: [Rule; 10] = [
    allowed(CHARACTER, None, None, MKNOD),
    allowed(BLOCK, None, None, MKNOD),
    allowed(CHARACTER, Some(1), Some(3), ALL_ACCESS),
    allowed(CHARACTER, Some(1), Some(5), ALL_ACCESS),
    allowed(CHARACTER, Some(1), Some(7), ALL_ACCESS),
    allowed(CHARACTER, Some(1), Some(8), ALL_ACCESS),
    allowed(CHARACTER, Some(1), Some(9), ALL_ACCESS),
    allowed(CHARACTER, Some(5), Some(0), ALL_ACCESS),
    allowed(CHARACTER, Some(5), Some(2), ALL_ACCESS),
    allowed(CHARACTER, Some(136), None, ALL_ACCESS),
];

/// Has the kernel ask a program of these rules about every device that a process in the cgroup opens or makes.
pub fn attach(cgroup: BorrowedFd<'_>, rules: &[LinuxDeviceCgroup]) -> Result<(), DeviceFilterError> {
    let program = load(&program(&read_rules(rules)?))?;
    attach_program(cgroup, &program)
}

fn read_rules(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, DeviceFilterError> {
    if rules.len() > MAX_RULES {
        return Err(DeviceFilterError::TooMany(rules.len()));
    }
    let mut read = Vec::with_capacity(rules.len() + BASIC.len());
    for (index, rule) in rules.iter().enumerate() {
        read.push(Rule {
            allow: rule.allow(),
            kind: read_kind(index, rule.typ())?,
            major: read_number(index, rule.major())?,
            minor: read_number(index, rule.minor())?,
            access: read_access(index, rule.access().as_deref())?,
        });
    }
    read.extend(BASIC);
    Ok(read)
}

fn read_kind(index: usize, kind: Option<LinuxDeviceType>) -> Result<Option<i32>, DeviceFilterError> {
    match kind {
        None | Some(LinuxDeviceType::A) => Ok(None),
        Some(LinuxDeviceType::B) => Ok(Some(BLOCK)),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Ok(Some(CHARACTER)),
        Some(LinuxDeviceType::P) => Err(DeviceFilterError::Type(index)),
    }
}

/// A negative number stands for any, as an absent one does.
fn read_number(index: usize, number: Option<i64>) -> Result<Option<i32>, DeviceFilterError> {
    match number {
        None | Some(..=-1) => Ok(None),
        Some(number) => i32::try_from(number).map(Some).map_err(|_| DeviceFilterError::Number(index)),
    }
}

fn read_access(index: usize, access: Option<&str>) -> Result<i32, DeviceFilterError> {
    let Some(access) = access.filter(|access| !access.is_empty()) else { return Ok(ALL_ACCESS) };
    access.chars().try_fold(0, |set, letter| match letter {
        'm' => Ok(set | MKNOD),
        'r' => Ok(set | READ),
        'w' => Ok(set | WRITE),
        _ => Err(DeviceFilterError::Access { index, access: access.to_owned() }),
    })
}

/// An instruction of eBPF, laid out as the kernel's `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Registers: the context comes in R1, the answer goes out in R0.
const R0_ANSWER: u8 = 0;
const R1_CONTEXT: u8 = 1;
const R2_KIND: u8 = 2;
const R3_WANTED: u8 = 3;
const R4_MAJOR: u8 = 4;
const R5_MINOR: u8 = 5;
const R6_ALLOWED: u8 = 6;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// 32-bit load from memory.
const fn load_word(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x61, to, from, offset, 0)
}

const fn move_register(to: u8, from: u8) -> Instruction {
    instruction(0xbc, to, from, 0, 0)
}

const fn move_value(to: u8, value: i32) -> Instruction {
    instruction(0xb4, to, 0, 0, value)
}

const fn and_value(to: u8, value: i32) -> Instruction {
    instruction(0x54, to, 0, 0, value)
}

const fn or_value(to: u8, value: i32) -> Instruction {
    instruction(0x44, to, 0, 0, value)
}

const fn shift_right(to: u8, bits: i32) -> Instruction {
    instruction(0x74, to, 0, 0, bits)
}

const fn and_register(to: u8, from: u8) -> Instruction {
    instruction(0x5c, to, from, 0, 0)
}

const fn jump_unless_value(register: u8, value: i32, skip: i16) -> Instruction {
    instruction(0x56, register, 0, skip, value)
}

const fn jump_unless_register(register: u8, other: u8, skip: i16) -> Instruction {
    instruction(0x5e, register, other, skip, 0)
}

const EXIT: Instruction = instruction(0x95, 0, 0, 0, 0);

/// The program that applies the rules.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    // The context: access << 16 | kind, major, minor.
    let mut code = vec![
        load_word(R2_KIND, R1_CONTEXT, 0),
        move_register(R3_WANTED, R2_KIND),
        and_value(R2_KIND, 0xffff),
        shift_right(R3_WANTED, 16),
        load_word(R4_MAJOR, R1_CONTEXT, 4),
        load_word(R5_MINOR, R1_CONTEXT, 8),
        move_value(R6_ALLOWED, 0),
    ];
    for rule in rules {
        code.extend(rule_code(rule));
    }
    code.extend([
        and_register(R6_ALLOWED, R3_WANTED),
        move_value(R0_ANSWER, 0),
        jump_unless_register(R6_ALLOWED, R3_WANTED, 1),
        move_value(R0_ANSWER, 1),
        EXIT,
    ]);
    code
}

fn rule_code(rule: &Rule) -> Vec<Instruction> {
    let tests: Vec<(u8, i32)> = [(R2_KIND, rule.kind), (R4_MAJOR, rule.major), (R5_MINOR, rule.minor)]
        .into_iter()
        .filter_map(|(register, value)| Some((register, value?)))
        .collect();
    let mut code = Vec::with_capacity(4);
    for (i, (register, value)) in tests.iter().enumerate() {
        // Over the tests that are left and the change.
        code.push(jump_unless_value(*register, *value, (tests.len() - i) as i16));
    }
    code.push(match rule.allow {
        true => or_value(R6_ALLOWED, rule.access),
        false => and_value(R6_ALLOWED, !rule.access),
    });
    code
}

/// `bpf(2)`: the commands and numbers used here.
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> Result<OwnedFd, DeviceFilterError> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadAttributes::default()
    };
    // SAFETY: the attributes point at the program and the licence, which outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &attributes, size_of::<LoadAttributes>()) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(DeviceFilterError::Load(std::io::Error::last_os_error())),
    }
}

fn attach_program(cgroup: BorrowedFd<'_>, program: &OwnedFd) -> Result<(), DeviceFilterError> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        ..AttachAttributes::default()
    };
    // SAFETY: the attributes are plain numbers that outlive the call.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attributes, size_of::<AttachAttributes>()) };
    if done == 0 { Ok(()) } else { Err(DeviceFilterError::Attach(std::io::Error::last_os_error())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn answer(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> i32 {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0i32; 11];
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, from) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
            at += 1;
            match i.code {
                0x61 => r[to] = context[i.offset as usize / 4],
                0xbc => r[to] = r[from],
                0xb4 => r[to] = i.immediate,
                0x54 => r[to] &= i.immediate,
                0x44 => r[to] |= i.immediate,
                0x74 => r[to] = (r[to] as u32 >> i.immediate) as i32,
                0x5c => r[to] &= r[from],
                0x56 if r[to] != i.immediate => at += i.offset as usize,
                0x5e if r[to] != r[from] => at += i.offset as usize,
                0x56 | 0x5e => {}
                0x95 => return r[0],
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn of(json: &str) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        program(&read_rules(&rules).unwrap())
    }

    #[test]
    fn the_default_rules_allow_the_basic_devices_only() {
        let program = of(r#"[{"allow": false, "access": "rwm"}]"#);
        assert_eq!(answer(&program, CHARACTER, READ | WRITE, 1, 3), 1);
        assert_eq!(answer(&program, CHARACTER, READ | WRITE, 136, 77), 1);
        assert_eq!(answer(&program, CHARACTER, MKNOD, 10, 229), 1);
        assert_eq!(answer(&program, CHARACTER, READ, 1, 1), 0);
        assert_eq!(answer(&program, BLOCK, READ, 254, 0), 0);
        assert_eq!(of("[]").len(), program.len() - 1);
    }

    #[test]
    fn rules_apply_in_order_and_access_by_access() {
        let program = of(r#"[
            {"allow": true, "type": "b", "major": 8, "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"}
        ]"#);
        assert_eq!(answer(&program, BLOCK, READ | WRITE, 8, 0), 1);
        assert_eq!(answer(&program, BLOCK, READ, 8, 1), 1);
        assert_eq!(answer(&program, BLOCK, READ | WRITE, 8, 1), 0);
        assert_eq!(answer(&program, CHARACTER, READ, 8, 0), 0);
    }

    #[test]
    fn everything_can_be_allowed() {
        let program = of(r#"[{"allow": true, "type": "a", "major": -1, "minor": -1}]"#);
        assert_eq!(answer(&program, BLOCK, ALL_ACCESS, 259, 4), 1);
    }

    #[test]
    fn rules_that_mean_nothing_are_refused_with_their_place() {
        let refused = |json: &str| {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
            read_rules(&rules).unwrap_err().to_string()
        };
        assert!(
            refused(r#"[{"allow": true}, {"allow": true, "access": "rx"}]"#).contains("devices[1].access")
        );
        assert!(refused(r#"[{"allow": true, "type": "p"}]"#).contains("devices[0].type"));
        assert!(refused(r#"[{"allow": true, "major": 4294967296}]"#).contains("devices[0]"));
    }
}
