//! The end of the machine.
//!
//! PID 1 must never exit: the kernel would panic. A machine without ACPI has no power-off of its own, so the
//! end is a byte to an I/O port that the machine watches, the one of QEMU's `isa-debug-exit` device.

use std::arch::asm;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::system::{RebootCommand, reboot};

use crate::kmsg;

/// The port of the power-off device.
const POWER_OFF_PORT: u16 = 0x501;

/// The byte that ends the machine.
const POWER_OFF_VALUE: u8 = 0x2a;

/// How the agent ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// It powers the guest off.
    PowerOff,
    /// It exits, since it is an ordinary process.
    Exit,
}

/// Syncs and ends the machine, or the process.
pub fn end(how: End) -> ! {
    rustix::fs::sync();
    if let End::PowerOff = how {
        power_off();
    }
    std::process::exit(0)
}

/// Whether this process is a child that sets itself up as a container's.
static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// From now on, an internal error ends this process only: it is a child, whose end the agent sees.
pub fn is_child() {
    IS_CHILD.store(true, Ordering::Relaxed);
}

/// Makes a panic end the machine, or the child, with its message in the kernel's log.
pub fn on_panic(how: End) {
    std::panic::set_hook(Box::new(move |panic| {
        kmsg::log(&format!("sandbox-agent: internal error: {panic}"));
        if IS_CHILD.load(Ordering::Relaxed) {
            // SAFETY: it ends this process at once, without running what belongs to the agent.
            unsafe { libc::_exit(1) }
        }
        end(how)
    }));
}

fn power_off() -> ! {
    // SAFETY: ioperm has no memory effects; it gives this thread the right to the two ports.
    let permitted = unsafe { libc::ioperm(POWER_OFF_PORT.into(), 2, 1) } == 0;
    if permitted {
        // SAFETY: the port is permitted, and a write to it ends the machine or does nothing.
        unsafe {
            asm!("out dx, al", in("dx") POWER_OFF_PORT, in("al") POWER_OFF_VALUE,
                options(nomem, nostack, preserves_flags));
        }
    }
    kmsg::log("sandbox-agent: the machine has no power-off port: resetting it instead");
    let _ = reboot(RebootCommand::Restart);
    loop {
        std::thread::park();
    }
}
