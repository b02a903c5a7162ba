use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;
use vm_memory::GuestAddress;

use super::*;
use crate::bus::BusDevice;
use crate::confine::Kind;
use crate::virtio::{BrokenRing, GuestMemory, Signals, VirtioDevice};

/// What a device was called for.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Notified(usize),
    Ready,
}

/// A device that reports its calls, with one descriptor of its own.
struct Reporter {
    calls: Sender<Call>,
    input: OwnedFd,
}

impl VirtioDevice for Reporter {
    fn name(&self) -> &str {
        "reporter"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 8]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn notified(
        &mut self,
        queue: usize,
        _queues: &mut [&mut Queue],
        _memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.calls.send(Call::Notified(queue)).unwrap();
        Ok(Signals::NONE)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.input.as_raw_fd()]
    }

    fn ready(
        &mut self,
        _fd: RawFd,
        _queues: &mut [&mut Queue],
        _memory: &GuestMemory,
    ) -> Result<Signals, BrokenRing> {
        self.calls.send(Call::Ready).unwrap();
        Ok(Signals::NONE)
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("calls".to_owned(), 7)])
    }
}

/// Brings the device up with queue 1 only.
fn bring_up(device: &MmioDevice) {
    let write = |offset: u64, value: u32| _ = device.write(offset, &value.to_le_bytes());
    for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 1)] {
        write(offset, value);
    }
    for (offset, value) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000), (0x44, 1), (0x70, 15)] {
        write(offset, value);
    }
}

#[test]
fn a_device_is_called_for_what_happens_to_it_and_only_while_it_is_up() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let (calls, received) = channel();
    let (input, output) = rustix::pipe::pipe().unwrap();
    let device = Reporter { calls, input };
    let device = Arc::new(MmioDevice::new(Box::new(device), memory, None).unwrap());
    let event_loop = EventLoop::start("test", Kind::Devices, std::slice::from_ref(&device)).unwrap();
    let next = || received.recv_timeout(Duration::from_secs(20)).unwrap();

    // Announced before the device is up, and known once it is.
    rustix::io::write(&output, b"x").unwrap();
    device.notify_events()[1].write(1).unwrap();
    bring_up(&device);
    let mut known = vec![next()];
    while !(known.contains(&Call::Ready) && known.contains(&Call::Notified(1))) {
        known.push(next());
    }
    assert!(!known.contains(&Call::Notified(0)));

    // The descriptor was not read, and still each write is news.
    rustix::io::write(&output, b"x").unwrap();
    while next() != Call::Ready {}
    for _ in 0..3 {
        device.notify_events()[1].write(1).unwrap();
        while next() != Call::Notified(1) {}
    }
    drop(event_loop);
    while received.try_recv().is_ok() {}
    device.notify_events()[1].write(1).unwrap();
    assert!(received.try_recv().is_err());
    assert_eq!(device.statistics()["calls"], 7);
}
