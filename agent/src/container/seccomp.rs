//! The system call filter of a process.

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};

use super::filter_program::Program;

/// The error that a forbidden system call returns where the configuration has none.
const DEFAULT_ERRNO: u32 = libc::EPERM as u32;

/// The level of libseccomp's optimisation that looks system calls up by halving.
const BINARY_TREE: u32 = 2;

/// A filter could not be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum SeccompFilterError {
    /// An action that needs a listener.
    #[error("linux.seccomp: SCMP_ACT_NOTIFY is not supported: use another action")]
    Notify,
    /// An errno over the kernel's limit.
    #[error("linux.seccomp: {0} is no value for errnoRet")]
    Errno(u32),
    /// libseccomp refused a part of it.
    #[error("linux.seccomp: cannot add {what}: {source}")]
    Part {
        /// Which part.
        what: String,
        /// Why not.
        source: SeccompError,
    },
    /// The filter could not be taken from libseccomp.
    #[error("linux.seccomp: cannot compile the filter: {0}")]
    Compile(std::io::Error),
    /// The kernel refused the filter.
    #[error("linux.seccomp: cannot load the filter: {0}")]
    Load(std::io::Error),
}

fn part(what: impl Into<String>) -> impl FnOnce(SeccompError) -> SeccompFilterError {
    let what = what.into();
    move |source| SeccompFilterError::Part { what, source }
}

/// Compiles the configured filter.
pub fn compile(configured: &LinuxSeccomp) -> Result<Program, SeccompFilterError> {
    let filter = rules(configured)?;
    let flags = configured.flags().iter().flatten().fold(0, |flags, flag| flags | flag_bit(*flag));
    let program = Program::new(&filter, flags).map_err(SeccompFilterError::Compile)?;
    match newest_named(configured) {
        Some(newest) if denies_by_default(configured) => {
            program.with_newer_missing(newest).map_err(SeccompFilterError::Compile)
        }
        _ => Ok(program),
    }
}

/// Puts this process and all that come from it under the filter.
pub fn load(filter: &Program) -> Result<(), SeccompFilterError> {
    filter.load().map_err(SeccompFilterError::Load)
}

fn rules(configured: &LinuxSeccomp) -> Result<ScmpFilterContext, SeccompFilterError> {
    let default = action(configured.default_action(), configured.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(part("the default action"))?;
    // An older libseccomp does not know it, and the filter is the same without.
    let _ = filter.set_ctl_optimize(BINARY_TREE);
    for arch in configured.architectures().iter().flatten() {
        add_arch(&mut filter, *arch)?;
    }
    for rule in configured.syscalls().iter().flatten() {
        add_rule(&mut filter, rule, default)?;
    }
    Ok(filter)
}

/// The greatest number of the system calls that the rules name.
fn newest_named(configured: &LinuxSeccomp) -> Option<u32> {
    let names = configured.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
    names.filter_map(|name| u32::try_from(i32::from(ScmpSyscall::from_name(name).ok()?)).ok()).max()
}

fn denies_by_default(configured: &LinuxSeccomp) -> bool {
    !matches!(
        configured.default_action(),
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog | LinuxSeccompAction::ScmpActTrace
    )
}

fn flag_bit(flag: Flag) -> u64 {
    match flag {
        Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        Flag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        // It concerns notifications, which are refused.
        Flag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

/// Architectures that this machine cannot execute are passed over.
fn add_arch(filter: &mut ScmpFilterContext, arch: Arch) -> Result<(), SeccompFilterError> {
    let arch = match arch {
        Arch::ScmpArchNative | Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX32 => ScmpArch::X32,
        _ => return Ok(()),
    };
    filter.add_arch(arch).map(drop).map_err(part(format!("the architecture {arch:?}")))
}

/// Adds the rules of one entry. System calls that libseccomp does not know are passed over, as in runc: profiles
/// name calls that a kernel may not have yet.
fn add_rule(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), SeccompFilterError> {
    let action = action(rule.action(), rule.errno_ret())?;
    if action == default {
        return Ok(());
    }
    let arguments = rule.args().as_deref().unwrap_or_default();
    for name in rule.names() {
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        for comparisons in alternatives(arguments) {
            filter
                .add_rule_conditional(action, call, &comparisons)
                .map_err(part(format!("a rule for {name}")))?;
        }
    }
    Ok(())
}

/// All comparisons of a rule must hold. libseccomp takes one for each argument only: where an argument is named
/// twice, each comparison becomes a rule of its own, as in runc.
fn alternatives(arguments: &[LinuxSeccompArg]) -> Vec<Vec<ScmpArgCompare>> {
    let twice = |a: &LinuxSeccompArg| arguments.iter().filter(|b| b.index() == a.index()).count() > 1;
    if arguments.iter().any(twice) {
        arguments.iter().map(|argument| vec![comparison(argument)]).collect()
    } else {
        vec![arguments.iter().map(comparison).collect()]
    }
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let (op, datum) = match argument.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, argument.value()),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, argument.value()),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, argument.value()),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, argument.value()),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, argument.value()),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, argument.value()),
        // Here the value is the mask, and the second value what must be left.
        Operator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(argument.value()), argument.value_two().unwrap_or(0))
        }
    };
    ScmpArgCompare::new(argument.index() as u32, op, datum)
}

fn action(configured: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompFilterError> {
    let errno = errno.unwrap_or(DEFAULT_ERRNO);
    let short = u16::try_from(errno).map_err(|_| SeccompFilterError::Errno(errno));
    Ok(match configured {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(short?.into()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(short?),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => return Err(SeccompFilterError::Notify),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(json: &str) -> Result<String, SeccompFilterError> {
        let filter = rules(&serde_json::from_str(json).unwrap())?;
        let mut text = tempfile::tempfile().unwrap();
        filter.export_pfc(&text).unwrap();
        let mut out = String::new();
        std::io::Seek::rewind(&mut text).unwrap();
        std::io::Read::read_to_string(&mut text, &mut out).unwrap();
        Ok(out)
    }

    #[test]
    fn rules_become_a_filter_and_unknown_calls_are_passed_over() {
        let text = compiled(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_ARM"],
                "syscalls": [
                    {"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                    {"names": ["socket"], "action": "SCMP_ACT_ERRNO",
                     "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}]}
                ]}"#,
        )
        .unwrap();
        assert!(text.contains("\"mkdir\"") && text.contains("ERRNO(38)"), "{text}");
        assert!(text.contains("\"socket\"") && text.contains("ERRNO(1)"), "{text}");
    }

    #[test]
    fn the_newest_call_that_is_named_and_known_counts() {
        let json = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["read", "openat", "no_such_call"], "action": "SCMP_ACT_ALLOW"}]}"#;
        let configured: LinuxSeccomp = serde_json::from_str(json).unwrap();
        assert_eq!(newest_named(&configured), Some(libc::SYS_openat as u32));
        assert!(denies_by_default(&configured));
        assert!(!denies_by_default(&serde_json::from_str(r#"{"defaultAction": "SCMP_ACT_LOG"}"#).unwrap()));
    }

    #[test]
    fn an_argument_named_twice_makes_two_rules() {
        let json = r#"[{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]"#;
        let twice: Vec<LinuxSeccompArg> = serde_json::from_str(json).unwrap();
        assert_eq!(alternatives(&twice).len(), 2);
        assert_eq!(alternatives(&[]), [vec![]]);
    }

    #[test]
    fn notifications_are_refused() {
        assert!(matches!(
            compiled(r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#),
            Err(SeccompFilterError::Notify)
        ));
    }
}
