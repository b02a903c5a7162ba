//! Resource limits of a process.

use oci_spec::runtime::{PosixRlimit, PosixRlimitType as Type};
use rustix::process::Pid;

/// A limit was refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {kind:?} of process.rlimits to soft {soft}, hard {hard}: {source}")]
pub struct RlimitError {
    kind: Type,
    soft: u64,
    hard: u64,
    source: std::io::Error,
}

/// Sets the limits of this process, which has the room for them.
pub fn set(limits: &[PosixRlimit]) -> Result<(), RlimitError> {
    for limit in limits {
        let (kind, soft, hard) = (limit.typ(), limit.soft(), limit.hard());
        let value = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // SAFETY: the structure is valid and only read.
        if unsafe { libc::setrlimit(number(kind), &value) } != 0 {
            return Err(RlimitError { kind, soft, hard, source: std::io::Error::last_os_error() });
        }
    }
    Ok(())
}

/// Raises what hard limits of a child, or of this process, are lower than it wants, and leaves the rest to it: with its final limits it
/// might not be able to set itself up.
pub fn make_room(child: Option<Pid>, limits: &[PosixRlimit]) -> Result<(), RlimitError> {
    for limit in limits {
        let (kind, soft, hard) = (limit.typ(), limit.soft(), limit.hard());
        let failed = |source| RlimitError { kind, soft, hard, source };
        let mut value = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        prlimit(child, kind, None, Some(&mut value)).map_err(failed)?;
        if value.rlim_max < hard {
            value.rlim_max = hard;
            prlimit(child, kind, Some(&value), None).map_err(failed)?;
        }
    }
    Ok(())
}

fn prlimit(
    process: Option<Pid>,
    kind: Type,
    new: Option<&libc::rlimit>,
    old: Option<&mut libc::rlimit>,
) -> std::io::Result<()> {
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    let old = old.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    // SAFETY: each pointer is null or points to a valid structure that outlives the call.
    let done = unsafe { libc::prlimit(Pid::as_raw(process), number(kind), new, old) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn number(kind: Type) -> libc::__rlimit_resource_t {
    match kind {
        Type::RlimitCpu => libc::RLIMIT_CPU,
        Type::RlimitFsize => libc::RLIMIT_FSIZE,
        Type::RlimitData => libc::RLIMIT_DATA,
        Type::RlimitStack => libc::RLIMIT_STACK,
        Type::RlimitCore => libc::RLIMIT_CORE,
        Type::RlimitRss => libc::RLIMIT_RSS,
        Type::RlimitNproc => libc::RLIMIT_NPROC,
        Type::RlimitNofile => libc::RLIMIT_NOFILE,
        Type::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        Type::RlimitAs => libc::RLIMIT_AS,
        Type::RlimitLocks => libc::RLIMIT_LOCKS,
        Type::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        Type::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        Type::RlimitNice => libc::RLIMIT_NICE,
        Type::RlimitRtprio => libc::RLIMIT_RTPRIO,
        Type::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
