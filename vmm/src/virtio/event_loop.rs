//! A thread that runs devices when something happens to them.
//!
//! Every descriptor is watched edge-triggered and none is read here: a new write to an eventfd is a new edge,
//! whatever its counter holds, and a device reads its own descriptors until they are empty.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::MmioDevice;
use crate::confine::{self, Kind};

/// The bytes of a device thread's stack: devices recurse nowhere.
const STACK_BYTES: usize = 256 << 10;

/// Events taken from the kernel at a time.
const BATCH: usize = 32;

/// Something that can happen.
enum Source {
    Stop,
    Activated(Arc<MmioDevice>),
    Notified(Arc<MmioDevice>, usize),
    Ready(Arc<MmioDevice>, RawFd),
}

/// How long an ending loop is waited for: a device may be in a system call that takes long.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// A running event loop; dropping it ends its thread. A thread that is in a system call of its device for too
/// long is left behind; it holds all that it uses.
#[derive(Debug)]
pub struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a thread, which carries this name and may do what its kind does, for these devices.
    pub fn start(name: &str, kind: Kind, devices: &[Arc<MmioDevice>]) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        let mut sources = Vec::new();
        watch(&epoll, &mut sources, stop.as_raw_fd(), Source::Stop)?;
        for device in devices {
            let activated = device.activated_event().as_raw_fd();
            watch(&epoll, &mut sources, activated, Source::Activated(Arc::clone(device)))?;
            for (queue, event) in device.notify_events().iter().enumerate() {
                watch(&epoll, &mut sources, event.as_raw_fd(), Source::Notified(Arc::clone(device), queue))?;
            }
            if let Some(timer) = device.timer() {
                watch(&epoll, &mut sources, timer, Source::Activated(Arc::clone(device)))?;
            }
            for &fd in device.event_fds() {
                watch(&epoll, &mut sources, fd, Source::Ready(Arc::clone(device), fd))?;
            }
        }
        let thread =
            std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(move || {
                confine::enter(kind);
                run(&epoll, &sources);
            })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let (Ok(()), Some(thread)) = (self.stop.write(1), self.thread.take()) else { return };
        let deadline = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                return tracing::warn!("a device does not return from the host and is left behind");
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let _ = thread.join();
    }
}

fn watch(epoll: &Epoll, sources: &mut Vec<Source>, fd: RawFd, source: Source) -> io::Result<()> {
    let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, sources.len() as u64))?;
    sources.push(source);
    Ok(())
}

fn run(epoll: &Epoll, sources: &[Source]) {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "the device thread cannot wait for events and ends");
                return;
            }
        };
        for event in events.iter().take(count) {
            let source = usize::try_from(event.data()).ok().and_then(|index| sources.get(index));
            match source {
                Some(Source::Stop) if event.event_set().contains(EventSet::IN) => return,
                Some(Source::Activated(device)) => device.run_activated(),
                Some(Source::Notified(device, queue)) => device.run_notified(*queue),
                Some(Source::Ready(device, fd)) => device.run_ready(*fd),
                Some(Source::Stop) | None => {}
            }
        }
    }
}

#[cfg(test)]
#[path = "event_loop_tests.rs"]
mod tests;
