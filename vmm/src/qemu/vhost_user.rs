//! A [`VirtioDevice`] served to QEMU over vhost-user.
//!
//! QEMU emulates the virtio-mmio transport and the driver's side of the device's set-up; over a unix socket
//! it hands this process the guest's memory (as a descriptor), the addresses of the rings, and an event
//! descriptor each way for every queue. From then on the rings are served here, and QEMU is not involved.
//!
//! The crate `vhost-user-backend` speaks the protocol and runs two threads per device: one for the socket, one
//! for the queues' events. [`Adapter`] is what it calls; the device sees the same calls as from the
//! virtio-mmio transport of the other machine.
//!
//! # Pause and reset look alike
//!
//! QEMU takes the rings back when the guest is paused and gives them out again when it goes on, and it does
//! the same when the driver resets the device. What tells the two apart is the place in the rings: a driver
//! that starts anew starts at their beginning. Either way nobody notifies the queues then, and what the
//! device's own descriptors announced meanwhile is gone, so the device is told of everything once.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sandbox_vmm_api::RateLimit;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::EventFd;

use crate::confine::{self, Kind};
use crate::virtio::rate::Limiter;
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};

type Memory = GuestMemoryAtomic<GuestMemory>;
type Vring = VringMutex<Memory>;

/// How many of a device's queues QEMU leaves to the back end: it keeps the vsock device's event queue.
const QUEUES_OF_BACKEND: usize = 2;

/// The event that QEMU has begun to hand out the rings. The library has the numbers up to that of its own exit
/// event, which follows the queues.
const START_EVENT: usize = QUEUES_OF_BACKEND + 1;

/// The event of the device's first descriptor.
const FIRST_DESCRIPTOR_EVENT: usize = START_EVENT + 1;

/// How often the rings are looked at until QEMU has handed out all of them, and how long apart.
const START_LOOKS: u32 = 1000;
const START_LOOK_EVERY: Duration = Duration::from_millis(1);

/// The largest queue: the driver follows QEMU's virtio-mmio transport, which offers this to every device.
const QUEUE_SIZE_MAX: usize = 1024;

/// Why a device could not be served.
#[derive(Debug, thiserror::Error)]
#[error("serving the {device} device to QEMU: {reason}")]
pub struct Error {
    device: String,
    reason: String,
}

/// A device that is being served. Its threads end when QEMU's end of the socket is closed; dropping it waits
/// for that.
pub struct Served {
    device: Arc<Adapter>,
    daemon: VhostUserDaemon<Arc<Adapter>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        use vhost::vhost_user::Error as Protocol;
        use vhost_user_backend::Error::HandleRequest;
        match self.daemon.wait() {
            Ok(()) | Err(HandleRequest(Protocol::Disconnected | Protocol::PartialMessage)) => {}
            Err(error) => tracing::error!(device = self.device.lock().device.name(), %error, "vhost-user"),
        }
    }
}

impl Served {
    /// Accepts the connection that waits at `listener` and serves the device on it, by a thread of this kind.
    pub fn start(
        device: Box<dyn VirtioDevice>,
        kind: Kind,
        limit: RateLimit,
        listener: UnixListener,
    ) -> Result<Self, Error> {
        let name = device.name().to_owned();
        let failed = |reason: String| Error { device: name.clone(), reason };
        let limiter = Limiter::new(limit).map_err(|error| failed(error.to_string()))?;
        // Each descriptor, and then the timer, where there is one, has an event of its own.
        let mut event_fds = device.event_fds();
        event_fds.extend(limiter.as_ref().map(Limiter::timer));
        let memory = Memory::new(GuestMemory::new());
        let adapter =
            Adapter::new(device, kind, limiter, memory.clone()).map_err(|error| failed(error.to_string()))?;
        let device = Arc::new(adapter);
        let mut daemon = VhostUserDaemon::new(name.clone(), device.clone(), memory)
            .map_err(|error| failed(error.to_string()))?;
        for handler in daemon.get_epoll_handlers() {
            for (index, fd) in event_fds.iter().enumerate() {
                let token = (FIRST_DESCRIPTOR_EVENT + index) as u64;
                handler
                    .register_listener(*fd, EventSet::IN | EventSet::EDGE_TRIGGERED, token)
                    .map_err(|error| failed(error.to_string()))?;
            }
            let start = device.start.as_raw_fd();
            handler
                .register_listener(start, EventSet::IN, START_EVENT as u64)
                .map_err(|error| failed(error.to_string()))?;
        }
        daemon.start(&mut listener.into()).map_err(|error| failed(error.to_string()))?;
        Ok(Self { device, daemon })
    }

    /// The device's counters, by its name.
    pub fn statistics(&self) -> (String, std::collections::BTreeMap<String, u64>) {
        let driven = self.device.lock();
        (driven.device.name().to_owned(), driven.device.statistics())
    }
}

/// The device as the vhost-user crate sees it.
struct Adapter {
    driven: Mutex<Driven>,
    /// What the thread is for that serves the queues.
    kind: Kind,
    /// Written when QEMU begins to hand out the rings.
    start: EventFd,
}

/// A device and its driver.
struct Driven {
    device: Box<dyn VirtioDevice>,
    limiter: Option<Limiter>,
    memory: Memory,
    features: u64,
    state: State,
    /// The places in the rings when they were served last.
    places: [u16; QUEUES_OF_BACKEND],
    /// Whether the log says that the guest broke a ring.
    told_of_break: bool,
}

/// Where the device stands with its driver.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// No driver has notified a queue yet.
    Idle,
    /// A driver uses it.
    Active,
    /// QEMU has taken the rings back; whether for a pause or for good is not known yet.
    Held,
    /// A ring broke; nothing is served until the driver resets the device.
    Broken,
}

impl Driven {
    fn reset(&mut self) {
        if self.state != State::Idle {
            self.device.reset();
            self.state = State::Idle;
        }
    }

    /// QEMU hands out the rings, for a driver with these features.
    fn begin(&mut self, features: u64) {
        let features = features & self.device.features();
        if self.state == State::Active && features == self.features {
            self.state = State::Held;
        } else if self.state != State::Held {
            self.reset();
        }
        self.features = features;
    }

    /// Serves one event; false: QEMU has not handed out the rings.
    fn serve(&mut self, event: Event, vrings: &[Vring]) -> bool {
        let memory = self.memory.memory();
        let mut guards: Vec<_> = vrings.iter().map(VringT::get_mut).collect();
        if !guards.iter().all(|guard| guard.get_queue().ready() && guard.is_enabled()) {
            return false;
        }
        let mut queues: Vec<&mut Queue> = guards.iter_mut().map(|guard| guard.get_queue_mut()).collect();
        let mut limiter = self.limiter.take();
        let result = match &mut limiter {
            Some(limiter) => limiter.run(|| self.dispatch(event, &mut queues, &memory)),
            None => self.dispatch(event, &mut queues, &memory),
        };
        self.limiter = limiter;
        match result {
            Ok(signals) => {
                self.places = places(&queues);
                for (index, guard) in guards.iter().enumerate().filter(|(index, _)| signals.has(*index)) {
                    if let Err(error) = guard.signal_used_queue() {
                        tracing::warn!(device = self.device.name(), queue = index, %error, "interrupt lost");
                    }
                }
            }
            Err(broken) => {
                // A guest can break its rings as often as it likes; once is worth a line.
                if !std::mem::replace(&mut self.told_of_break, true) {
                    tracing::warn!(device = self.device.name(), %broken, "the guest broke a ring: device stopped");
                }
                self.state = State::Broken;
            }
        }
        true
    }

    fn dispatch(
        &mut self,
        event: Event,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        match self.state {
            State::Broken => return Ok(Signals::NONE),
            State::Active => {}
            State::Held if places(queues) == self.places => {
                self.state = State::Active;
                return self.tell_everything(queues, memory);
            }
            State::Held | State::Idle => {
                self.reset();
                self.device.activate(self.features);
                self.state = State::Active;
                return self.tell_everything(queues, memory);
            }
        }
        match event {
            Event::Start => self.tell_everything(queues, memory),
            Event::Queue(queue) => self.device.notified(queue, queues, memory),
            Event::Descriptor(index) => match self.device.event_fds().get(index) {
                Some(fd) => self.device.ready(*fd, queues, memory),
                // The timer of its limit.
                None => self.tell_everything(queues, memory),
            },
        }
    }

    /// Tells the device of every queue and every descriptor.
    fn tell_everything(
        &mut self,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let mut signals = Signals::NONE;
        for fd in self.device.event_fds() {
            signals |= self.device.ready(fd, queues, memory)?;
        }
        for queue in 0..queues.len() {
            signals |= self.device.notified(queue, queues, memory)?;
        }
        Ok(signals)
    }
}

/// Where the queues are read next.
fn places(queues: &[&mut Queue]) -> [u16; QUEUES_OF_BACKEND] {
    std::array::from_fn(|index| queues.get(index).map_or(0, |queue| queue.next_avail()))
}

/// What has happened.
#[derive(Clone, Copy)]
enum Event {
    /// QEMU has handed out the rings.
    Start,
    /// The driver has notified a queue.
    Queue(usize),
    /// A descriptor of the device has something.
    Descriptor(usize),
}

impl Adapter {
    fn new(
        device: Box<dyn VirtioDevice>,
        kind: Kind,
        limiter: Option<Limiter>,
        memory: Memory,
    ) -> io::Result<Self> {
        let places = [0; QUEUES_OF_BACKEND];
        let driven =
            Driven { device, limiter, memory, features: 0, state: State::Idle, places, told_of_break: false };
        let start = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        Ok(Self { driven: Mutex::new(driven), kind, start })
    }

    /// Waits until QEMU has handed out all rings, and serves them.
    ///
    /// QEMU hands them out right after the features, which is when this is called, and tells of no end of it.
    fn start(&self, vrings: &[Vring]) {
        // The counter only wakes.
        let _ = self.start.read();
        for _ in 0..START_LOOKS {
            if self.lock().serve(Event::Start, vrings) {
                return;
            }
            std::thread::sleep(START_LOOK_EVERY);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Driven> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VhostUserBackend for Adapter {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES_OF_BACKEND
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        self.lock().device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// QEMU sets the features each time that it begins to hand out the rings.
    fn acked_features(&self, features: u64) {
        self.lock().begin(features);
        if let Err(error) = self.start.write(1) {
            tracing::error!(%error, "waking the thread of a device");
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // The library's thread for the socket asks this first, before it is handed any memory.
        confine::enter_once(Kind::VhostUser);
        // QEMU has the file device's configuration from its own command line, and complains of two sources.
        match self.lock().device.device_type() {
            VIRTIO_ID_FS => VhostUserProtocolFeatures::REPLY_ACK,
            _ => VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK,
        }
    }

    fn reset_device(&self) {
        self.lock().reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        /// The most that the protocol carries (`VHOST_USER_CONFIG_SIZE`).
        const MOST: usize = 256;
        let mut data = vec![0; (size as usize).min(MOST)];
        self.lock().device.read_config(offset.into(), &mut data);
        data
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.lock().memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        confine::enter_once(self.kind);
        let event = usize::from(event);
        match event.checked_sub(FIRST_DESCRIPTOR_EVENT) {
            Some(index) => {
                self.lock().serve(Event::Descriptor(index), vrings);
            }
            None if event == START_EVENT => self.start(vrings),
            None => {
                self.lock().serve(Event::Queue(event), vrings);
            }
        }
        Ok(())
    }
}
