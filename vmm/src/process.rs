//! What the process settles about itself before anything else.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::{Resource, Rlimit};
use sandbox_vmm_api::EVENT_FD;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The process that started this one; 0 when it is in another process id namespace.
static PARENT: AtomicI32 = AtomicI32::new(0);

/// Settles everything.
pub fn settle() -> io::Result<()> {
    limit_heaps();
    leave_no_core()?;
    ignore_terminal_signals();
    die_with_parent()
}

/// One heap for all threads: each of its own would take memory that a machine has no use for.
fn limit_heaps() {
    // SAFETY: `mallopt` changes a parameter of the allocator; there is no other thread yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// No memory of the guest's lands in a file of the host when the process crashes. QEMU inherits this.
fn leave_no_core() -> io::Result<()> {
    let nothing = Rlimit { current: Some(0), maximum: Some(0) };
    Ok(rustix::process::setrlimit(Resource::Core, nothing)?)
}

/// A key press in the runtime's terminal is for the runtime: it decides what becomes of the machine.
fn ignore_terminal_signals() {
    for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGTSTP] {
        // SAFETY: ignoring a signal runs no code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Ends the process when its parent has died.
///
/// The closed event socket says so too, to a process that can listen. The kernel's signal comes when the
/// *thread* ends that started this process, so its handler looks whether the process is gone as well: the parent
/// is another then, or where it cannot be seen, its end of the event socket is closed.
pub fn die_with_parent() -> io::Result<()> {
    extern "C" fn look(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let parent = PARENT.load(Ordering::Relaxed);
        let mut byte = 0u8;
        // SAFETY: these calls may be made in a signal handler, the one that writes has a byte to write to, and what
        // was interrupted finds its error number as it was.
        unsafe {
            let error = *libc::__errno_location();
            let gone = if parent == 0 {
                let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
                libc::recv(EVENT_FD, (&raw mut byte).cast(), 1, flags) == 0
            } else {
                libc::getppid() != parent
            };
            if gone {
                libc::_exit(1);
            }
            *libc::__errno_location() = error;
        }
    }
    // SAFETY: `getppid` cannot fail.
    PARENT.store(unsafe { libc::getppid() }, Ordering::Relaxed);
    let signal = SIGRTMIN() + 1;
    register_signal_handler(signal, look).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    // SAFETY: PR_SET_PDEATHSIG takes a signal number by value.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
