//! What happened, told to containerd.
//!
//! containerd takes events in the order in which they come and believes it, so that one thread sends them, one after
//! the other. A containerd that is being restarted is waited for, for a while; it asks for the state of tasks when it is
//! back, so that an event that never arrived loses nobody anything but time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::EventsClient;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::MessageFull;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{Client, context};

use crate::log;

/// How many events may wait. More than that is a containerd that is gone for good.
const QUEUE_LENGTH: usize = 1024;

/// How often an event is tried, and how long after the one time the next comes.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_secs(1);

/// How long a connection is kept when no event comes: its client looks a hundred times a second whether it is to end.
const IDLE_TIME: Duration = Duration::from_secs(1);

/// How long containerd may take to take an event.
const SEND_TIME: Duration = Duration::from_secs(5);

/// An event, and the topic that containerd knows it under.
pub trait Event: MessageFull {
    /// The topic.
    const TOPIC: &str;
}

macro_rules! topics {
    ($($event:ty => $topic:literal,)*) => {
        $(impl Event for $event {
            const TOPIC: &str = $topic;
        })*
    };
}

topics! {
    TaskCreate => "/tasks/create",
    TaskStart => "/tasks/start",
    TaskExit => "/tasks/exit",
    TaskDelete => "/tasks/delete",
    TaskExecAdded => "/tasks/exec-added",
    TaskExecStarted => "/tasks/exec-started",
    TaskPaused => "/tasks/paused",
    TaskResumed => "/tasks/resumed",
    TaskOOM => "/tasks/oom",
}

/// Sends events.
#[derive(Debug)]
pub struct Events {
    namespace: String,
    /// Whether anybody is told.
    heard: bool,
    queue: Mutex<Option<SyncSender<Envelope>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Whether nothing is worth waiting for any more.
    finishing: Arc<AtomicBool>,
}

impl Events {
    /// Sends to the containerd that listens at this address.
    pub fn to(address: String, namespace: &str) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(QUEUE_LENGTH);
        let finishing = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&finishing);
        let thread = std::thread::Builder::new()
            .name("events".into())
            .spawn(move || forward(&address, &receiver, &seen))?;
        let (queue, thread) = (Mutex::new(Some(sender)), Mutex::new(Some(thread)));
        Ok(Self { namespace: namespace.into(), heard: true, queue, thread, finishing })
    }

    /// Sends to nobody.
    pub fn to_nobody() -> Self {
        Self {
            namespace: String::new(),
            heard: false,
            queue: Mutex::default(),
            thread: Mutex::default(),
            finishing: Arc::default(),
        }
    }

    /// Puts an event behind those that are on their way.
    pub fn publish<E: Event>(&self, event: &E) {
        if !self.heard {
            return;
        }
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.into(),
            event: Some(any(event)).into(),
            ..Envelope::default()
        };
        let queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if queue.as_ref().is_none_or(|queue| queue.try_send(envelope).is_err()) {
            log::error(None, &format!("the event {} was dropped: containerd does not take any", E::TOPIC));
        }
    }

    /// Waits until those that are on their way have arrived, or were given up: a containerd that is gone is not waited
    /// for any more. There are no others after that.
    pub fn finish(&self) {
        self.finishing.store(true, Ordering::Relaxed);
        drop(self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let _ = thread.map(JoinHandle::join);
    }
}

fn forward(address: &str, queue: &Receiver<Envelope>, finishing: &AtomicBool) {
    let mut client = None;
    loop {
        let next = match client {
            Some(_) => queue.recv_timeout(IDLE_TIME),
            None => queue.recv().map_err(RecvTimeoutError::from),
        };
        let envelope = match next {
            Ok(envelope) => envelope,
            Err(RecvTimeoutError::Timeout) => {
                client = None;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
        for attempt in 1..=ATTEMPTS {
            match send(&mut client, address, &request) {
                Ok(()) => break,
                // The connection may have been to one that is no more.
                Err(_) if attempt == 1 => {}
                Err(error) if attempt == ATTEMPTS || finishing.load(Ordering::Relaxed) => {
                    log::error(None, &format!("the event {topic} could not be sent to containerd: {error}"));
                    break;
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }
}

fn send(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> containerd_shim_protos::ttrpc::Result<()> {
    let connected = match client.take() {
        Some(client) => client,
        None => EventsClient::new(Client::connect(&format!("unix://{address}"))?),
    };
    connected.forward(context::with_duration(SEND_TIME), request)?;
    // One that failed is not used again.
    *client = Some(connected);
    Ok(())
}

/// A message with its name, as containerd writes it.
pub fn any<M: MessageFull>(message: &M) -> Any {
    let mut value = Vec::new();
    // Writing to memory fails only for messages that lack a required field, which version 3 of the language has not.
    let _ = message.write_to_vec(&mut value);
    Any { type_url: M::descriptor().full_name().into(), value, ..Any::default() }
}

/// A time in the form of the protocol.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since_epoch.as_secs().try_into().unwrap_or(i64::MAX),
        nanos: since_epoch.subsec_nanos().try_into().unwrap_or(0),
        ..Timestamp::default()
    }
}
