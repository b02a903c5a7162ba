//! Whether KVM runs kernel code at a usable speed on this host.
//!
//! That `/dev/kvm` exists says little. Where the processor's virtualization is not to be had, a KVM may run a
//! guest's user code natively and *interpret* its kernel code, some hundred times slower and not completely.
//! So the bare machine runs a small loop in ring 0, and the loop is timed, less the time of a
//! program that does nothing: entering and leaving a guest has its own price, which says nothing about code. A
//! busy host can make one trial slow, so there are more as long as the speed is below the limit; on hosts that
//! interpret, all of it takes about 10 ms.

use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use super::bare::{Bare, BareError};
use super::open::KvmUnusable;
use super::vm::VmError;
use crate::boot::registers;
use crate::memory::Layout;
use crate::virtio::GuestMemory;

/// The least speed, in instructions per microsecond. Interpreted ring 0 has 2 to 6; a processor with
/// virtualization has thousands, and one that is itself emulated still has hundreds.
const LEAST_PER_MICRO: f64 = 20.0;

/// The turns of the loop in a trial.
const TURNS: u32 = 300;
/// Trials at most.
const TRIALS: u32 = 3;

/// The loop: `inc eax` as often as fills a turn, `dec ecx`, `jnz` back; then a write to a port, which leaves
/// the guest.
const PROGRAM: [u8; INSTRUCTIONS_PER_TURN as usize + 3] = program();
const INSTRUCTIONS_PER_TURN: u32 = 32;

const fn program() -> [u8; INSTRUCTIONS_PER_TURN as usize + 3] {
    const INC_EAX: u8 = 0x40;
    const DEC_ECX: u8 = 0x49;
    const JNZ: u8 = 0x75;
    const OUT_AL: u8 = 0xe6;
    let mut program = [INC_EAX; INSTRUCTIONS_PER_TURN as usize + 3];
    program[30] = DEC_ECX;
    program[31] = JNZ;
    // Back over the whole turn, from the end of the jump's two bytes.
    program[32] = (INSTRUCTIONS_PER_TURN as u8 + 1).wrapping_neg();
    program[33] = OUT_AL;
    program[34] = END_PORT;
    program
}

/// A port that no device has.
const END_PORT: u8 = 0xf0;

const PROGRAM_START: u64 = 0x1000;

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
        f64::from(self.instructions) / (self.time.as_secs_f64() * 1e6)
    }

    fn is_usable(self) -> bool {
        self.per_micro() >= LEAST_PER_MICRO
    }

    /// The measurement in words.
    pub fn describe(self) -> String {
        if self.time < Duration::from_micros(1) {
            return format!(
                "guest kernel code runs {} instructions in less than 0.001 ms",
                self.instructions
            );
        }
        format!(
            "guest kernel code runs at {:.0} million instructions/s ({} in {:.3} ms)",
            self.per_micro(),
            self.instructions,
            self.time.as_secs_f64() * 1e3
        )
    }
}

/// Makes a bare machine, if KVM is usable, and says how fast it is.
pub fn probe(layout: Layout, memory: GuestMemory, vcpus: u8) -> Result<(Bare, Speed), KvmUnusable> {
    let mut bare = Bare::new(layout, memory, vcpus).map_err(|error| match error {
        BareError::Open(unusable) => unusable,
        error => KvmUnusable { finding: error.to_string(), remedy: "see the kernel log".to_owned() },
    })?;
    let speed = measure(&mut bare).map_err(|error| KvmUnusable {
        finding: format!("/dev/kvm is there but cannot run a small program: {error}"),
        remedy: "see the kernel log, or use the software machine".to_owned(),
    })?;
    if speed.is_usable() {
        return Ok((bare, speed));
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
    #[error("it cannot be put into memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("it ended in {0}")]
    Exit(String),
}

fn measure(bare: &mut Bare) -> Result<Speed, MeasureError> {
    bare.memory.write_slice(&PROGRAM, GuestAddress(PROGRAM_START))?;
    // The first run also builds what the host needs to run the guest at all.
    run(bare, 1)?;
    let mut entry = run(bare, 1)?;
    let mut best = Speed::new(run(bare, TURNS)?, entry);
    for _ in 1..TRIALS {
        if best.is_usable() {
            break;
        }
        entry = entry.min(run(bare, 1)?);
        let speed = Speed::new(run(bare, TURNS)?, entry);
        if speed.time < best.time {
            best = speed;
        }
    }
    bare.memory.write_slice(&[0; PROGRAM.len()], GuestAddress(PROGRAM_START))?;
    Ok(best)
}

/// Runs the loop and says how long it took.
fn run(bare: &mut Bare, turns: u32) -> Result<Duration, MeasureError> {
    let mut regs = registers::general(PROGRAM_START, 0);
    regs.rcx = turns.into();
    bare.first.set_regs(&regs).map_err(VmError::of("set a vCPU's registers"))?;
    let start = Instant::now();
    loop {
        match bare.first.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(END_PORT) => break,
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return Err(MeasureError::Exit(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(VmError::of("run a vCPU")(error).into()),
        }
    }
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_judged_by_the_limit() {
        let speed = |micros| Speed { instructions: 1000, time: Duration::from_micros(micros) };
        assert!(speed(49).is_usable() && !speed(51).is_usable());
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
        let layout = Layout::new(1 << 20);
        let mut bare = match Bare::new(layout, crate::memory::map(layout).unwrap(), 1) {
            Ok(bare) => bare,
            Err(error) => return eprintln!("SKIPPED: {error}"),
        };
        bare.memory.write_slice(&PROGRAM, GuestAddress(PROGRAM_START)).unwrap();
        for _ in 0..2 {
            run(&mut bare, 100).unwrap();
            let regs = bare.first.get_regs().unwrap();
            assert_eq!((regs.rcx, regs.rax), (0, 3000));
        }
    }
}
