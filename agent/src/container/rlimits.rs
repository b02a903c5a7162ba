//! Resource limits of a process.

use oci_spec::runtime::{PosixRlimit, PosixRlimitType as Type};

/// A limit was refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {kind:?} of process.rlimits to soft {soft}, hard {hard}: {source}")]
pub struct RlimitError {
    kind: Type,
    soft: u64,
    hard: u64,
    source: std::io::Error,
}

/// Sets the limits of this process.
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
