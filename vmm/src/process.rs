//! What the process settles about itself before anything else.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The process that started this one.
static PARENT: AtomicI32 = AtomicI32::new(0);

/// Settles everything.
pub fn settle() -> io::Result<()> {
    limit_heaps();
    ignore_terminal_signals();
    die_with_parent()
}

/// One heap for all threads: each of its own would take memory that a machine has no use for.
fn limit_heaps() {
    // SAFETY: `mallopt` changes a parameter of the allocator; there is no other thread yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
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
/// *thread* ends that started this process, so its handler looks whether the process is gone as well.
fn die_with_parent() -> io::Result<()> {
    extern "C" fn look(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: both calls may be made in a signal handler.
        unsafe {
            if libc::getppid() != PARENT.load(Ordering::Relaxed) {
                libc::_exit(1);
            }
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
