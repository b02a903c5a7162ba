//! Small programs in ring 0, on the host's own KVM.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::BusDevice;
use crate::kvm::bare::Bare;
use crate::kvm::run_control;
use crate::legacy::{KeyboardController, PowerSwitch};
use crate::memory::Layout;

const START: u64 = 0x1000;

/// A device that remembers what is written and reads as one more.
#[derive(Default)]
struct Memory(Mutex<Vec<u8>>);

impl BusDevice for Memory {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let last = self.0.lock().unwrap().last().copied().unwrap_or(0);
        data.fill(last + 1);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Access {
        self.0.lock().unwrap().extend_from_slice(data);
        Access::Done
    }
}

struct Bench {
    bare: Bare,
    shared: Shared,
    port: Arc<Memory>,
    mmio: Arc<Memory>,
}

/// A machine with this program, or `None` (and a notice) where there is no KVM.
fn bench(program: &[u8]) -> Option<Bench> {
    let layout = Layout::new(1 << 20);
    let bare = match Bare::new(layout, crate::memory::map(layout).unwrap(), 1) {
        Ok(bare) => bare,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            return None;
        }
    };
    bare.memory.write_slice(program, GuestAddress(START)).unwrap();
    bare.first.set_regs(&registers::general(START, 0)).unwrap();
    let (port, mmio) = (Arc::new(Memory::default()), Arc::new(Memory::default()));
    let mut shared = Shared {
        memory_bus: Bus::default(),
        port_bus: Bus::default(),
        control: RunControl::default(),
        end: OnceLock::new(),
        ended: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap(),
        exits: AtomicU64::new(0),
    };
    shared.port_bus.attach(0x40f, 1, Arc::clone(&port) as _);
    shared.port_bus.attach(0x60, 5, Arc::new(KeyboardController));
    shared.port_bus.attach(0x501, 1, Arc::new(PowerSwitch));
    shared.memory_bus.attach(0xd000_0000, 0x1000, Arc::clone(&mmio) as _);
    Some(Bench { bare, shared, port, mmio })
}

/// Runs the program to its end.
fn run_to_end(bench: &mut Bench) -> GuestEnd {
    loop {
        if let Some(end) = step(&mut bench.bare.first, &bench.shared) {
            return end;
        }
    }
}

#[test]
fn ports_and_memory_reach_their_devices() {
    let program = [
        0x66, 0xba, 0x0f, 0x04, //             mov dx, 0x40f
        0xb0, 0x11, //                         mov al, 0x11
        0xee, //                               out dx, al
        0xec, //                               in al, dx
        0xa2, 0x10, 0x00, 0x00, 0xd0, //       mov [0xd0000010], al
        0x8b, 0x0d, 0x20, 0x00, 0x00, 0xd0, // mov ecx, [0xd0000020]
        0x8b, 0x1d, 0x00, 0x00, 0x00, 0xe0, // mov ebx, [0xe0000000], where nobody is
        0x66, 0xba, 0x01, 0x05, //             mov dx, 0x501
        0xb0, 0x2a, //                         mov al, 0x2a
        0xee, //                               out dx, al
    ];
    let Some(mut bench) = bench(&program) else { return };
    assert_eq!(run_to_end(&mut bench), GuestEnd::PowerOff);
    assert_eq!(*bench.port.0.lock().unwrap(), [0x11]);
    assert_eq!(*bench.mmio.0.lock().unwrap(), [0x12]);
    let regs = bench.bare.first.get_regs().unwrap();
    assert_eq!((regs.rcx, regs.rbx), (0x1313_1313, 0xffff_ffff));
    assert_eq!(bench.shared.exits.load(Ordering::SeqCst), 6);
}

#[test]
fn the_keyboard_controller_resets() {
    let program = [
        0xe4, 0x64, //       in al, 0x64
        0xa8, 0x02, //       test al, 2
        0x75, 0xfa, //       jnz back
        0xb0, 0xfe, //       mov al, 0xfe
        0xe6, 0x64, //       out 0x64, al
    ];
    let Some(mut bench) = bench(&program) else { return };
    assert_eq!(run_to_end(&mut bench), GuestEnd::Reset);
}

/// A fault whose handler cannot be reached, nor that of the fault that follows.
#[test]
fn a_processor_that_gives_up_is_a_triple_fault() {
    let program = [
        0x0f, 0x01, 0x1d, 0x00, 0x20, 0x00, 0x00, // lidt [0x2000], which is empty
        0x0f, 0x0b, //                               ud2
    ];
    let Some(mut bench) = bench(&program) else { return };
    assert_eq!(run_to_end(&mut bench), GuestEnd::TripleFault);
}

#[test]
fn a_failure_says_where_it_was() {
    let Some(bench) = bench(&[0xf4]) else { return };
    let text = failure::describe(&bench.bare.first, "it broke");
    assert!(text.starts_with("it broke (rip 0x1000, rsp 0x0, rflags 0x2, cr0 0x11"), "{text}");
}

#[test]
fn a_guest_that_never_leaves_can_be_held_and_ended() {
    let program = [
        0xff, 0x05, 0x00, 0x18, 0x00, 0x00, // turn: inc dword [0x1800]
        0xeb, 0xf8, //                         jmp turn
    ];
    let Some(Bench { bare, shared, .. }) = bench(&program) else { return };
    run_control::install_signal().unwrap();
    let shared = Arc::new(shared);
    let Bare { first, vm: _vm, memory, .. } = bare;
    let count = || memory.read_obj::<u32>(GuestAddress(0x1800)).unwrap();
    let threads = vec![start(0, first, Arc::clone(&shared)).unwrap()];
    shared.control.hold_all(&threads).unwrap();
    assert_eq!(count(), 0);
    for _ in 0..3 {
        let before = count();
        shared.control.run();
        let deadline = Instant::now() + Duration::from_secs(20);
        while count() == before {
            assert!(Instant::now() < deadline, "the guest does not run");
            std::thread::yield_now();
        }
        shared.control.hold_all(&threads).unwrap();
        let held = count();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(count(), held);
    }
    shared.control.end_all(threads);
    assert_eq!(shared.end.get(), None);
}
