//! A [`VirtioDevice`] served to QEMU over vhost-user.
//!
//! QEMU emulates the virtio-mmio transport and the driver's side of the device's set-up; over a unix socket
//! it hands this process the guest's memory (as a descriptor), the addresses of the rings, and an event
//! descriptor each way for every queue. From then on the rings are served here, and QEMU is not involved.
//!
//! The crate `vhost-user-backend` speaks the protocol and runs two threads per device: one for the socket, one
//! for the queues' events. [`Adapter`] is what it calls; the device sees the same calls as from the
//! virtio-mmio transport of the other machine.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};

type Memory = GuestMemoryAtomic<GuestMemory>;
type Vring = VringMutex<Memory>;

/// How many of a device's queues QEMU leaves to the back end: it keeps the vsock device's event queue.
const QUEUES_OF_BACKEND: usize = 2;

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
    /// Accepts the connection that waits at `listener` and serves the device on it.
    pub fn start(device: Box<dyn VirtioDevice>, listener: UnixListener) -> Result<Self, Error> {
        let name = device.name().to_owned();
        let failed = |reason: String| Error { device: name.clone(), reason };
        let event_fds = device.event_fds();
        let memory = Memory::new(GuestMemory::new());
        let device = Arc::new(Adapter::new(device, memory.clone()));
        let mut daemon = VhostUserDaemon::new(name.clone(), device.clone(), memory)
            .map_err(|error| failed(error.to_string()))?;
        for handler in daemon.get_epoll_handlers() {
            for (index, fd) in event_fds.iter().enumerate() {
                let token = (QUEUES_OF_BACKEND + 2 + index) as u64;
                handler
                    .register_listener(*fd, EventSet::IN | EventSet::EDGE_TRIGGERED, token)
                    .map_err(|error| failed(error.to_string()))?;
            }
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
struct Adapter(Mutex<Driven>);

/// A device and its driver.
struct Driven {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    features: u64,
    state: State,
}

/// Where the device stands with its driver.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// No driver has notified a queue yet.
    Idle,
    /// A driver uses it.
    Active,
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

    /// Serves one event: of a queue, or of a descriptor of the device.
    fn serve(&mut self, event: usize, vrings: &[Vring]) {
        let memory = self.memory.memory();
        let mut guards: Vec<_> = vrings.iter().map(VringT::get_mut).collect();
        let mut queues: Vec<&mut Queue> = guards.iter_mut().map(|guard| guard.get_queue_mut()).collect();
        let started = queues.iter().all(|queue| queue.ready());
        if !started || self.state == State::Broken {
            return;
        }
        let outcome = self.dispatch(event, &mut queues, &memory);
        match outcome {
            Ok(signals) => {
                for (index, guard) in guards.iter().enumerate().filter(|(index, _)| signals.has(*index)) {
                    if let Err(error) = guard.signal_used_queue() {
                        tracing::warn!(device = self.device.name(), queue = index, %error, "interrupt lost");
                    }
                }
            }
            Err(broken) => {
                tracing::warn!(device = self.device.name(), %broken, "the guest broke a ring: device stopped");
                self.state = State::Broken;
            }
        }
    }

    fn dispatch(
        &mut self,
        event: usize,
        queues: &mut [&mut Queue],
        memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        let mut signals = Signals::NONE;
        if self.state == State::Idle {
            if event >= QUEUES_OF_BACKEND {
                return Ok(signals);
            }
            self.device.activate(self.features);
            self.state = State::Active;
            // What came before is announced once: the descriptors are edge-triggered.
            for fd in self.device.event_fds() {
                signals |= self.device.ready(fd, queues, memory)?;
            }
        }
        signals |= match self.device.event_fds().get(event.wrapping_sub(QUEUES_OF_BACKEND + 2)) {
            Some(fd) => self.device.ready(*fd, queues, memory)?,
            None => self.device.notified(event, queues, memory)?,
        };
        Ok(signals)
    }
}

impl Adapter {
    fn new(device: Box<dyn VirtioDevice>, memory: Memory) -> Self {
        Self(Mutex::new(Driven { device, memory, features: 0, state: State::Idle }))
    }

    fn lock(&self) -> MutexGuard<'_, Driven> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// QEMU sets the features each time that a driver starts the device.
    fn acked_features(&self, features: u64) {
        let mut driven = self.lock();
        driven.reset();
        driven.features = features & driven.device.features();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
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
        self.lock().serve(event.into(), vrings);
        Ok(())
    }
}
