//! The system calls of each kind of thread, with the reason of each group.

use std::collections::BTreeMap;

use libc::{
    SYS_accept4, SYS_brk, SYS_capget, SYS_capset, SYS_clock_gettime, SYS_clock_nanosleep, SYS_close,
    SYS_connect, SYS_copy_file_range, SYS_dup, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait, SYS_eventfd2,
    SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat,
    SYS_fcntl, SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr, SYS_flock, SYS_fremovexattr, SYS_fsetxattr,
    SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getdents64, SYS_getegid, SYS_geteuid,
    SYS_getpeername, SYS_getpid, SYS_getppid, SYS_getrandom, SYS_getsockname, SYS_getsockopt, SYS_gettid,
    SYS_getxattr, SYS_ioctl, SYS_kill, SYS_linkat, SYS_listxattr, SYS_lseek, SYS_madvise, SYS_mincore,
    SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_name_to_handle_at,
    SYS_nanosleep, SYS_newfstatat, SYS_openat, SYS_openat2, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64,
    SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlinkat, SYS_readv,
    SYS_recvfrom, SYS_recvmsg, SYS_removexattr, SYS_renameat2, SYS_restart_syscall, SYS_rt_sigprocmask,
    SYS_rt_sigreturn, SYS_sched_yield, SYS_sendmsg, SYS_sendto, SYS_setgroups, SYS_setresgid, SYS_setresuid,
    SYS_setsockopt, SYS_setxattr, SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_statx, SYS_symlinkat,
    SYS_syncfs, SYS_tgkill, SYS_timerfd_settime, SYS_umask, SYS_unlinkat, SYS_unshare, SYS_utimensat,
    SYS_wait4, SYS_waitid, SYS_write, SYS_writev,
};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::Kind;
use crate::fs::Access;

/// What any thread of a Rust program does: memory, locks, time, signals, its end; and to write to a descriptor that
/// it has, for the log and for eventfds.
const ALL: &[i64] = &[
    SYS_brk,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_getppid,
    SYS_getrandom,
    SYS_gettid,
    SYS_madvise,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_read,
    SYS_readv,
    SYS_restart_syscall,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_yield,
    SYS_sigaltstack,
    SYS_write,
    SYS_writev,
];

/// The serial port's file is bounded in place.
const CONSOLE: &[i64] = &[SYS_fstat, SYS_ftruncate, SYS_lseek, SYS_statx];

const EVENTS: &[i64] =
    &[SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait, SYS_poll, SYS_ppoll, SYS_timerfd_settime];

/// Sockets that there are, and those that are accepted from them.
const SOCKETS: &[i64] = &[
    SYS_accept4,
    SYS_fcntl,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_setsockopt,
    SYS_shutdown,
];

/// What a file server does below a directory that is open; and what a disk does, whose image is open already.
const FILES: &[i64] = &[
    SYS_capget,
    SYS_dup,
    SYS_fallocate,
    SYS_fchdir,
    SYS_fcntl,
    SYS_fdatasync,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_flock,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_getdents64,
    SYS_getegid,
    SYS_geteuid,
    SYS_getxattr,
    SYS_listxattr,
    SYS_lseek,
    SYS_name_to_handle_at,
    SYS_newfstatat,
    SYS_openat,
    SYS_openat2,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_readlinkat,
    SYS_statx,
    SYS_syncfs,
    SYS_umask,
];

/// What changes files, and the identity in whose name it does so.
const CHANGES: &[i64] = &[
    SYS_capset,
    SYS_copy_file_range,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchown,
    SYS_fchownat,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_ftruncate,
    SYS_linkat,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_removexattr,
    SYS_renameat2,
    SYS_setgroups,
    SYS_setresgid,
    SYS_setresuid,
    SYS_setxattr,
    SYS_symlinkat,
    SYS_unlinkat,
    SYS_utimensat,
];

/// The guest's memory comes as descriptors, and queues with eventfds.
const VHOST_USER: &[i64] = &[SYS_dup, SYS_eventfd2, SYS_fstat, SYS_lseek, SYS_statx];

/// The machine's memory is measured, and the panic log is read from it.
const CONTROL: &[i64] = &[SYS_fstat, SYS_lseek, SYS_mincore, SYS_newfstatat, SYS_pread64, SYS_statx];

/// `KVM_*` of a vCPU, from `linux/kvm.h`: to run it, to excuse a pause, and to describe one that failed.
const KVM_RUN: u64 = 0xae80;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;

/// `TUNSETOFFLOAD` of `linux/if_tun.h`: the guest's driver says what it can take.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;

/// The rules of one kind: a call that is in none of them is refused; so is one whose arguments fit none of its
/// own.
pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What a kind of thread may call.
pub fn of(kind: Kind) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    allow(&mut rules, ALL);
    // Rust's checks of what it closes.
    allow_if(&mut rules, SYS_fcntl, equals(1, libc::F_GETFD as u64)?)?;
    // Memory is never executable that was not at the start.
    allow_if(&mut rules, SYS_mmap, masked(2, libc::PROT_EXEC as u64, 0)?)?;
    allow_if(&mut rules, SYS_mprotect, masked(2, libc::PROT_EXEC as u64, 0)?)?;
    allow_if(&mut rules, SYS_prctl, equals(0, libc::PR_GET_NAME as u64)?)?;
    allow_if(&mut rules, SYS_tgkill, equals(0, std::process::id().into())?)?;
    match kind {
        Kind::Vcpu => {
            allow(&mut rules, CONSOLE);
            // A driver that resets its device ends the connections of it.
            allow(&mut rules, &[SYS_epoll_ctl, SYS_shutdown]);
            for request in [KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, KVM_GET_SREGS, TUNSETOFFLOAD] {
                allow_if(&mut rules, SYS_ioctl, equals(1, request)?)?;
            }
        }
        Kind::Devices => {
            allow(&mut rules, EVENTS);
            allow(&mut rules, SOCKETS);
            allow(&mut rules, &[SYS_connect]);
            allow_if(&mut rules, SYS_socket, equals(0, libc::AF_UNIX as u64)?)?;
            for request in [libc::FIONBIO, TUNSETOFFLOAD] {
                allow_if(&mut rules, SYS_ioctl, equals(1, request)?)?;
            }
        }
        Kind::Files(access) => {
            allow(&mut rules, EVENTS);
            allow(&mut rules, FILES);
            if access == Access::ReadWrite {
                allow(&mut rules, CHANGES);
                // Before a write in another's name, the file server looks at its own capabilities.
                for option in [libc::PR_CAPBSET_READ, libc::PR_CAP_AMBIENT] {
                    allow_if(&mut rules, SYS_prctl, equals(0, option as u64)?)?;
                }
            }
            // The working directory and the umask become the thread's own.
            allow_if(&mut rules, SYS_unshare, equals(0, libc::CLONE_FS as u64)?)?;
        }
        Kind::VhostUser => {
            allow(&mut rules, EVENTS);
            allow(&mut rules, SOCKETS);
            allow(&mut rules, VHOST_USER);
        }
        Kind::Listener => {
            allow(&mut rules, CONSOLE);
            // How a socket is read.
            allow(&mut rules, &[SYS_recvfrom]);
        }
        Kind::Control | Kind::ControlOfQemu => {
            allow(&mut rules, EVENTS);
            allow(&mut rules, SOCKETS);
            allow(&mut rules, CONTROL);
            allow_if(&mut rules, SYS_ioctl, equals(1, libc::FIONBIO)?)?;
            if kind == Kind::ControlOfQemu {
                allow(&mut rules, &[SYS_wait4, SYS_waitid]);
                allow_if(&mut rules, SYS_kill, equals(1, libc::SIGKILL as u64)?)?;
            }
        }
    }
    Ok(rules)
}

/// A call with any arguments.
fn allow(rules: &mut Rules, calls: &[i64]) {
    rules.extend(calls.iter().map(|call| (*call, vec![])));
}

/// A call with arguments of which this is true, besides others.
fn allow_if(rules: &mut Rules, call: i64, condition: SeccompCondition) -> Result<(), BackendError> {
    rules.entry(call).or_default().push(SeccompRule::new(vec![condition])?);
    Ok(())
}

fn equals(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}
