//! Whether KVM runs kernel code at a usable speed on this host.
//!
//! That `/dev/kvm` exists says little. Where the processor's virtualization is not to be had, a KVM may run a
//! guest's user code natively and *interpret* its kernel code, some hundred times slower and not completely.
//! So a throw-away virtual machine runs a small loop in ring 0, and the loop is timed, less the time of a
//! program that does nothing: entering and leaving a guest has its own price, which says nothing about code. A
//! busy host can make one trial slow, so there are more as long as the speed is below the limit; on hosts that
//! interpret, all of it takes about 10 ms.

use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::open::{self, KvmUnusable};
use super::vm::{self, VmError};
use crate::boot::registers;
use crate::virtio::GuestMemory;

/// The least speed, in instructions per microsecond. Interpreted ring 0 has 2 to 6; a processor with
/// virtualization has thousands, and one that is itself emulated still has hundreds.
const LEAST_PER_MICRO: f64 = 10.0;

/// The turns of the loop in a trial.
const TURNS: u32 = 300;
/// Trials at most.
const TRIALS: u32 = 3;

/// The loop: `inc eax` as often as fills a turn, `dec ecx`, `jnz` back; then `hlt`.
const PROGRAM: [u8; INSTRUCTIONS_PER_TURN as usize + 2] = program();
const INSTRUCTIONS_PER_TURN: u32 = 32;

const fn program() -> [u8; INSTRUCTIONS_PER_TURN as usize + 2] {
    const INC_EAX: u8 = 0x40;
    const DEC_ECX: u8 = 0x49;
    const JNZ: u8 = 0x75;
    const HLT: u8 = 0xf4;
    let mut program = [INC_EAX; INSTRUCTIONS_PER_TURN as usize + 2];
    program[30] = DEC_ECX;
    program[31] = JNZ;
    // Back over the whole turn, from the end of the jump's two bytes.
    program[32] = (INSTRUCTIONS_PER_TURN as u8 + 1).wrapping_neg();
    program[33] = HLT;
    program
}

const PROGRAM_START: u64 = 0x1000;
const MEMORY_BYTES: usize = 0x2000;

/// How fast ring 0 runs.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    instructions: u32,
    time: Duration,
}

impl Speed {
    /// Of a trial that took so long, of which entering and leaving took a part.
    fn new(trial: Duration, entry: Duration) -> Self {
        Self { instructions: INSTRUCTIONS_PER_TURN * TURNS, time: trial.saturating_sub(entry) }
    }

    fn per_micro(self) -> f64 {
        f64::from(self.instructions) / (self.time.as_secs_f64() * 1e6).max(0.1)
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
    // The first run also builds what the host needs to run the guest at all.
    trial.run(1)?;
    let mut entry = trial.run(1)?;
    let mut best = Speed::new(trial.run(TURNS)?, entry);
    for _ in 1..TRIALS {
        if best.is_usable() {
            break;
        }
        entry = entry.min(trial.run(1)?);
        let speed = Speed::new(trial.run(TURNS)?, entry);
        if speed.time < best.time {
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

    /// Runs the loop and says how long it took.
    fn run(&mut self, turns: u32) -> Result<Duration, MeasureError> {
        let mut regs = registers::general(PROGRAM_START, 0);
        regs.rcx = turns.into();
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
        Ok(start.elapsed())
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
    fn a_trial_that_is_faster_than_nothing_is_fast() {
        let micro = Duration::from_micros(1);
        assert!(Speed::new(micro, 2 * micro).is_usable());
    }

    #[test]
    fn the_program_runs_to_its_end() {
        let Ok(kvm) = open::open() else { return eprintln!("SKIPPED: no usable /dev/kvm") };
        let mut trial = Trial::new(&kvm).unwrap();
        trial.run(100).unwrap();
        let regs = trial.vcpu.get_regs().unwrap();
        assert_eq!((regs.rcx, regs.rax), (0, 3000));
    }
}
