//! Whether KVM runs kernel code at a usable speed on this host.
//!
//! That `/dev/kvm` exists says little. Where the processor's virtualization is not to be had, a KVM may run a
//! guest's user code natively and *interpret* its kernel code, some hundred times slower and not completely.
//! So a throw-away virtual machine runs a small loop in ring 0, and the loop is timed. It starts short, which
//! is all that a fast host needs, and gets longer as long as the speed is below the limit, since leaving and
//! entering a guest has its own price; on the slowest hosts all of it stays below 15 ms.

use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::open::{self, KvmUnusable};
use super::vm::{self, VmError};
use crate::boot::registers;
use crate::virtio::GuestMemory;

/// The least speed, in instructions per microsecond. Interpreted ring 0 has about 2; a processor with
/// virtualization has thousands, and one that is itself emulated still has a hundred.
const LEAST_PER_MICRO: f64 = 10.0;

/// The turns of the loop in one trial after the other.
const TRIALS: [u32; 3] = [400, 1_600, 3_200];

/// The loop touches memory, as kernel code does.
const PROGRAM: [u8; 12] = [
    0xff, 0x05, 0x00, 0x18, 0x00, 0x00, // turn: inc dword [0x1800]
    0x50, //                                     push eax
    0x58, //                                     pop eax
    0x49, //                                     dec ecx
    0x75, 0xf5, //                               jnz turn
    0xf4, //                               hlt
];
const INSTRUCTIONS_PER_TURN: u32 = 5;
const STACK_END: u64 = 0x1800;
const PROGRAM_START: u64 = 0x1000;
const MEMORY_BYTES: usize = 0x2000;

/// How fast ring 0 runs.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    instructions: u32,
    time: Duration,
}

impl Speed {
    fn per_micro(self) -> f64 {
        f64::from(self.instructions) / (self.time.as_secs_f64() * 1e6).max(1e-3)
    }

    fn is_usable(self) -> bool {
        self.per_micro() >= LEAST_PER_MICRO
    }

    /// The measurement in words.
    pub fn describe(self) -> String {
        format!(
            "guest kernel code runs at {:.0} million instructions/s ({} in {:.3} ms)",
            self.per_micro(),
            self.instructions,
            self.time.as_secs_f64() * 1e3
        )
    }
}

/// Opens KVM if it is usable, and says how fast it is.
pub fn probe() -> Result<(Kvm, Speed), KvmUnusable> {
    let kvm = open::open()?;
    let speed = measure(&kvm).map_err(|error| KvmUnusable {
        finding: format!("/dev/kvm is there but cannot run a small program: {error}"),
        remedy: "see the kernel log; use the software machine".to_owned(),
    })?;
    if speed.is_usable() {
        return Ok((kvm, speed));
    }
    Err(KvmUnusable {
        finding: format!(
            "{}, and {LEAST_PER_MICRO:.0} are needed: this /dev/kvm interprets kernel code instead of running it",
            speed.describe()
        ),
        remedy: "use a host with hardware virtualization (nested virtualization, if it is itself a virtual \
                 machine), or the software machine"
            .to_owned(),
    })
}

#[derive(Debug, thiserror::Error)]
enum MeasureError {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("no memory for it: {0}")]
    Memory(String),
    #[error("it ended in {0}")]
    Exit(String),
}

/// The virtual machine of the probe. The virtual machine goes before its memory.
struct Trial {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemory,
}

fn measure(kvm: &Kvm) -> Result<Speed, MeasureError> {
    let mut trial = Trial::new(kvm)?;
    let mut best = trial.run(TRIALS[0])?;
    for turns in TRIALS.into_iter().skip(1) {
        if best.is_usable() {
            break;
        }
        let speed = trial.run(turns)?;
        if speed.per_micro() > best.per_micro() {
            best = speed;
        }
    }
    Ok(best)
}

impl Trial {
    fn new(kvm: &Kvm) -> Result<Self, MeasureError> {
        let vm = vm::create(kvm)?;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
            .map_err(|error| MeasureError::Memory(error.to_string()))?;
        memory
            .write_slice(&PROGRAM, GuestAddress(PROGRAM_START))
            .map_err(|error| MeasureError::Memory(error.to_string()))?;
        vm::add_memory(&vm, &memory)?;
        let vcpu = vm.create_vcpu(0).map_err(VmError::of("create a vCPU"))?;
        let mut sregs = vcpu.get_sregs().map_err(VmError::of("read a vCPU's segments"))?;
        registers::set_protected_mode(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(VmError::of("set a vCPU's segments"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    fn run(&mut self, turns: u32) -> Result<Speed, MeasureError> {
        let mut regs = registers::general(PROGRAM_START, 0);
        regs.rcx = turns.into();
        regs.rsp = STACK_END;
        self.vcpu.set_regs(&regs).map_err(VmError::of("set a vCPU's registers"))?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => return Err(MeasureError::Exit(format!("{exit:?}"))),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(VmError::of("run a vCPU")(error).into()),
            }
        }
        Ok(Speed { instructions: INSTRUCTIONS_PER_TURN * turns, time: start.elapsed() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_judged_by_the_limit() {
        let speed = |micros| Speed { instructions: 1000, time: Duration::from_micros(micros) };
        assert!(speed(99).is_usable() && !speed(101).is_usable());
        assert_eq!(
            speed(500).describe(),
            "guest kernel code runs at 2 million instructions/s (1000 in 0.500 ms)"
        );
    }

    #[test]
    fn the_program_runs_to_its_end() {
        let Ok(kvm) = open::open() else { return eprintln!("SKIPPED: no usable /dev/kvm") };
        let speed = Trial::new(&kvm).unwrap().run(100).unwrap();
        assert_eq!(speed.instructions, 500);
    }
}
