//! Checks that a program can be the guest's `/init`: 64-bit x86 ELF, and static, since the guest has no dynamic
//! loader. Finding out here costs nothing; in the guest it is a kernel panic with error 2.
//!
//! Field offsets are those of `Elf64_Ehdr` and `Elf64_Phdr` in the System V ABI.

/// Why a program cannot be the guest's `/init`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unusable {
    /// No ELF magic number.
    #[error("it is not an ELF program")]
    NotElf,
    /// Another processor's, or not an executable.
    #[error("it is not an executable for 64-bit x86")]
    NotForThisMachine,
    /// The program headers point outside the file.
    #[error("its ELF headers are cut off")]
    CutOff,
    /// It names a dynamic loader.
    #[error("it needs a dynamic loader, which the guest does not have; link it statically (crt-static)")]
    Dynamic,
}

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_INTERPRETER: u32 = 3;

/// Checks that `program` can run in a guest that has nothing else.
///
/// # Errors
/// [`Unusable`] says why not.
pub fn check(program: &[u8]) -> Result<(), Unusable> {
    if !program.starts_with(b"\x7fELF") {
        return Err(Unusable::NotElf);
    }
    let header = program.get(..ELF_HEADER_BYTES).ok_or(Unusable::CutOff)?;
    let executable = matches!(u16_at(header, 16), Some(TYPE_EXECUTABLE | TYPE_SHARED));
    if header[4..6] != CLASS_64_LITTLE_ENDIAN || !executable || u16_at(header, 18) != Some(MACHINE_X86_64) {
        return Err(Unusable::NotForThisMachine);
    }
    for segment in program_headers(program)?.chunks_exact(PROGRAM_HEADER_BYTES) {
        if segment.starts_with(&SEGMENT_INTERPRETER.to_le_bytes()) {
            return Err(Unusable::Dynamic);
        }
    }
    Ok(())
}

/// The bytes of the program header table.
fn program_headers(program: &[u8]) -> Result<&[u8], Unusable> {
    let offset = program.get(32..40).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    let start = offset.and_then(|offset| usize::try_from(offset).ok()).ok_or(Unusable::CutOff)?;
    if u16_at(program, 54) != Some(PROGRAM_HEADER_BYTES as u16) {
        return Err(Unusable::CutOff);
    }
    let count = usize::from(u16_at(program, 56).ok_or(Unusable::CutOff)?);
    let end = start.checked_add(count * PROGRAM_HEADER_BYTES).ok_or(Unusable::CutOff)?;
    program.get(start..end).ok_or(Unusable::CutOff)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..offset + 2)?.try_into().ok().map(u16::from_le_bytes)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The headers of a static program with one loadable segment.
    pub fn static_program() -> Vec<u8> {
        program_with_segment(1)
    }

    fn program_with_segment(kind: u32) -> Vec<u8> {
        let mut program = vec![0; ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[16..18].copy_from_slice(&TYPE_SHARED.to_le_bytes());
        program[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        program[32..40].copy_from_slice(&64u64.to_le_bytes());
        program[54..56].copy_from_slice(&56u16.to_le_bytes());
        program[56..58].copy_from_slice(&1u16.to_le_bytes());
        program[64..68].copy_from_slice(&kind.to_le_bytes());
        program
    }

    #[test]
    fn a_static_program_passes() {
        assert_eq!(check(&static_program()), Ok(()));
    }

    #[test]
    fn a_dynamic_program_is_refused() {
        assert_eq!(check(&program_with_segment(SEGMENT_INTERPRETER)), Err(Unusable::Dynamic));
    }

    #[test]
    fn another_machine_is_refused() {
        let mut program = static_program();
        program[18] = 183;
        assert_eq!(check(&program), Err(Unusable::NotForThisMachine));
    }

    #[test]
    fn every_truncation_is_refused_without_a_panic() {
        let program = static_program();
        for length in 0..program.len() {
            assert!(check(&program[..length]).is_err(), "{length} bytes passed");
        }
    }

    #[test]
    fn a_table_beyond_the_end_is_refused() {
        let mut program = static_program();
        program[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(check(&program), Err(Unusable::CutOff));
    }
}
