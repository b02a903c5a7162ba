//! The agent: PID 1 of the guest.
//!
//! One static program is all that a guest's initramfs holds. It has one thread and one loop:
//!
//! 1. `boot` makes the descriptors, dials the host, says hello, and mounts what a guest needs;
//! 2. `serve` waits for the host's requests (`control`, `requests`), for processes that end (`reaper`)
//!    and for bytes to carry (`stream`);
//!    (`requests`, `pause` and `resources` carry requests out, `lifecycle` follows processes, `memory` what
//!    the kernel kills, `forward` leads connections of the host to services of the guest);
//! 3. `container` makes containers: it clones a child into new namespaces and a cgroup, and the child sets
//!    itself up and executes the workload;
//! 4. `power` ends the machine: on request, when the host is gone, and when the agent itself fails.
//!
//! One thread is not only simple, it makes `clone` without `exec` sound: the child of a process with one thread
//! may allocate and call anything, so no second copy of the program has to be loaded to set a container up.

mod boot;
mod bounded;
mod configure;
mod container;
mod control;
mod dial;
mod forget;
mod forward;
mod kmsg;
mod lifecycle;
mod memory;
mod network;
mod pause;
mod power;
mod process;
mod reaper;
mod requests;
mod resources;
mod serve;
mod stdio;
mod stream;

use std::ffi::OsString;
use std::path::PathBuf;

use dial::Dialer;

/// Runs the agent: as the guest's PID 1, or, with `--host-socket PATH`, as an ordinary process that finds the
/// host at the unix sockets `PATH_1024` and `PATH_1025` and ends instead of powering off.
///
/// The second form is for tests and needs mount, pid and network namespaces of its own.
///
/// # Returns
///
/// The exit code; never in a guest, whose PID 1 must not end.
pub fn run() -> i32 {
    let first_instruction = boot::since_kernel_start();
    let place = Place::from_arguments(std::env::args_os().skip(1));
    boot::standard_descriptors();
    power::on_panic(place.end());
    let ended = boot::dial_host(place.dialer(), first_instruction).and_then(|control| {
        boot::system()?;
        if place == Place::Guest {
            boot::machine()?;
        }
        serve::Agent::new(control, place.dialer())?.serve().map_err(boot::BootError::from)
    });
    if let Err(e) = ended {
        kmsg::log(&format!("sandbox-agent: {e}"));
    }
    power::end(place.end())
}

/// Where the agent runs.
#[derive(Debug, PartialEq)]
enum Place {
    /// PID 1 of a guest.
    Guest,
    /// An ordinary process, with the host at this socket.
    Process(PathBuf),
}

impl Place {
    /// A kernel hands words of its command line that it does not know to PID 1, so others are passed over.
    fn from_arguments(mut arguments: impl Iterator<Item = OsString>) -> Self {
        match arguments.find(|a| a == "--host-socket").and_then(|_| arguments.next()) {
            Some(path) => Self::Process(path.into()),
            None => Self::Guest,
        }
    }

    fn dialer(&self) -> Dialer {
        match self {
            Self::Guest => Dialer::Vsock,
            Self::Process(path) => Dialer::Unix(path.clone()),
        }
    }

    fn end(&self) -> power::End {
        match self {
            Self::Guest => power::End::PowerOff,
            Self::Process(_) => power::End::Exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_kernel_command_line_are_passed_over() {
        let place = |words: &[&str]| Place::from_arguments(words.iter().map(OsString::from));
        assert_eq!(place(&["quiet", "--host-socket"]), Place::Guest);
        assert_eq!(place(&["x", "--host-socket", "/s"]), Place::Process("/s".into()));
    }
}
