//! A guest that owns its kernel, against the devices: their registers and their rings, by direct access.
//!
//! The attacks are made by a bare guest (see [`sandbox_tests::bare`]), so that each access is what it says here. After
//! each of them the device has to serve a proper request again, for a driver that resets it; the machine goes on, and
//! in the end nothing of it is left.

use sandbox_tests::bare::victim::{
    REPORTS, RNG, SIZE, Tap, VSOCK, Victim, all_devices, request_packet, victims,
};
use sandbox_tests::bare::{
    self, DATA, Descriptor, MEMORY_BYTES, Ring, Script, device, flag, register, status,
};
use sandbox_tests::place::on_kvm;
use sandbox_tests::{sandbox, skip};

/// How often the guest looks for what becomes of an attack. On the software machine nobody tells it that a device of
/// ours has stopped.
const LOOKS: u32 = 1 << 20;
const LOOKS_ON_QEMU: u32 = 100_000;

/// How often it looks where the device may not have looked at all.
const LOOKS_IN_VAIN: u32 = 100;

/// The queues of a device that are attacked.
fn targets(victim: &Victim) -> impl Iterator<Item = usize> {
    [victim.live].into_iter().chain(victim.heeded.iter().copied()).chain(victim.unheeded.iter().copied())
}

/// What may become of an attack on a queue: what the guest sees, and that a proper request is served afterwards.
fn expected(victim: &Victim, queue: usize, attack: &Attack) -> &'static [&'static str] {
    match (victim.name, on_kvm()) {
        _ if victim.unheeded.contains(&queue) => &["B.", "-."],
        // Free memory may be reported as often as the driver likes.
        ("balloon", _) if queue == REPORTS && attack.name == SAME_MEMORY => &["u."],
        // The file server answers what it cannot read by a used buffer without a byte in it; that a device of ours has
        // stopped, QEMU does not tell its guest.
        ("fs", true) => &["B.", "u."],
        (_, true) => &["B."],
        (_, false) => &["-.", "u."],
    }
}

/// Breaks the ring of a queue, and waits for what becomes of it.
fn make(attack: &Attack, victim: &Victim, queue: usize, script: &mut Script) {
    let mut rings = victim.rings();
    script.bring_up(victim.features, &mut rings);
    let ring = &mut rings[queue];
    (attack.break_ring)(script, ring);
    script.notify(ring);
    let looks = match on_kvm() {
        _ if victim.unheeded.contains(&queue) => LOOKS_IN_VAIN,
        true => LOOKS,
        false => LOOKS_ON_QEMU,
    };
    script.settle(ring.used_address(), 0, looks);
}

const SAME_MEMORY: &str = "buffers that are all the same memory, over and over";

struct Attack {
    name: &'static str,
    break_ring: fn(&mut Script, &mut Ring),
}

const fn attack(name: &'static str, break_ring: fn(&mut Script, &mut Ring)) -> Attack {
    Attack { name, break_ring }
}

/// A buffer of 16 bytes that the device reads, with a successor.
fn linked(next: u16) -> Descriptor {
    Descriptor { address: DATA.into(), len: 16, flags: flag::NEXT, next }
}

/// Offers one buffer.
fn offer_buffer(script: &mut Script, ring: &mut Ring, address: u64, len: u32) {
    script.offer_chain(ring, 0, &[(address, len, flag::WRITE)]);
}

/// Offers an indirect table of these descriptors, `bytes` long.
fn offer_table(script: &mut Script, ring: &mut Ring, table: &[Descriptor], bytes: u32) {
    let at = DATA + 0x1_0000;
    for (slot, descriptor) in (0..).zip(table) {
        script.copy(at + 16 * slot, &descriptor.bytes());
    }
    script.describe(ring, 0, Descriptor { address: at.into(), len: bytes, flags: flag::INDIRECT, next: 0 });
    script.offer(ring, 0);
}

/// Every way to break a ring that has one answer.
const ATTACKS: [Attack; 17] = [
    attack("the available ring runs ahead by more than its size", |script, ring| {
        script.offer_more(ring, SIZE + 1);
    }),
    attack("the available ring runs ahead by all there is", |script, ring| script.offer_more(ring, u16::MAX)),
    attack("a head outside of the table", |script, ring| script.offer(ring, SIZE)),
    attack("a successor outside of the table", |script, ring| {
        script.describe(ring, 0, linked(u16::MAX));
        script.offer(ring, 0);
    }),
    attack("a descriptor that follows itself", |script, ring| {
        script.describe(ring, 0, linked(0));
        script.offer(ring, 0);
    }),
    attack("two descriptors that follow each other", |script, ring| {
        script.describe(ring, 0, linked(1));
        script.describe(ring, 1, linked(0));
        script.offer(ring, 0);
    }),
    attack("a buffer outside of memory", |script, ring| offer_buffer(script, ring, 0x7000_0000, 64)),
    attack("a buffer above 4 GiB", |script, ring| offer_buffer(script, ring, 0x12_3456_7000, 64)),
    attack("a buffer in the registers of a device", |script, ring| {
        offer_buffer(script, ring, if on_kvm() { 0xd000_0000 } else { 0xfeb0_0000 }, 64);
    }),
    attack("a buffer across the end of memory", |script, ring| {
        offer_buffer(script, ring, MEMORY_BYTES - 8, 64);
    }),
    attack("a buffer across the end of all addresses", |script, ring| {
        offer_buffer(script, ring, u64::MAX - 8, 64);
    }),
    attack("a buffer of 4 GiB", |script, ring| offer_buffer(script, ring, DATA.into(), u32::MAX)),
    attack(SAME_MEMORY, |script, ring| {
        let unused = 64 << 20;
        script.offer_chain(ring, 0, &[(unused, 48 << 20, flag::WRITE); SIZE as usize]);
    }),
    attack("an indirect table inside of an indirect table", |script, ring| {
        let inner = Descriptor { address: DATA.into(), len: 16, flags: flag::INDIRECT, next: 0 };
        offer_table(script, ring, &[inner], 16);
    }),
    attack("an indirect table of half a descriptor", |script, ring| {
        offer_table(script, ring, &[linked(0)], 24);
    }),
    attack("an indirect table whose descriptors follow each other", |script, ring| {
        offer_table(script, ring, &[linked(1), linked(0)], 32);
    }),
    attack("an indirect table outside of memory", |script, ring| {
        script.describe(
            ring,
            0,
            Descriptor { address: 0x7000_0000, len: 32, flags: flag::INDIRECT, next: 0 },
        );
        script.offer(ring, 0);
    }),
];

#[test]
fn broken_rings_of_every_kind_stop_the_device_until_it_is_reset() {
    let neighbour = sandbox("neighbour").command(["sleep", "1000"]);
    let container = neighbour.start();
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        for queue in targets(&victim) {
            script.say(&format!("\n{} {queue} ", victim.name));
            for attack in &ATTACKS {
                make(attack, &victim, queue, &mut script);
                victim.expect_service(&mut script);
            }
        }
    }
    script.say("\nall\n");
    let tap = Tap::new("sbhr");
    let mut machine = bare::start(script, |config, directory| all_devices(config, directory, &tap));
    machine.expect_running();
    bare::wait_for(&machine, "\nall\n");
    let report = bare::report(&machine);
    for victim in victims() {
        for queue in targets(&victim) {
            let name = format!("{} {queue} ", victim.name);
            let line = report.lines().find_map(|line| line.strip_prefix(&name));
            let line = line.unwrap_or_else(|| panic!("{name}: {report}"));
            for (attack, came_of) in ATTACKS.iter().zip(line.as_bytes().chunks(2)) {
                let came_of = std::str::from_utf8(came_of).unwrap();
                let expected = expected(&victim, queue, attack);
                assert!(expected.contains(&came_of), "{name}, {}: {came_of} in\n{report}", attack.name);
            }
            assert_eq!(line.len(), 2 * ATTACKS.len(), "{report}");
        }
    }
    neighbour.exec(&[], ["echo", "unharmed"]).expect_stdout("unharmed\n");
    container.end();
}

#[test]
fn a_head_that_is_offered_many_times_is_served_as_often_and_confuses_nobody() {
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        let mut rings = victim.rings();
        script.bring_up(victim.features, &mut rings);
        let (readable, writable) = victim.request;
        script.copy(DATA, readable);
        let ring = &mut rings[victim.live];
        let buffers =
            [(DATA.into(), readable.len() as u32, 0), (u64::from(DATA) + 0x1000, writable, flag::WRITE)];
        script.offer_chain(ring, 0, &buffers);
        for _ in 1..SIZE {
            script.offer(ring, 0);
        }
        script.notify(ring);
        script.wait_used(ring);
        victim.expect_service(&mut script);
    }
    let tap = Tap::new("sbhd");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    assert_eq!(report, ".".repeat(victims().len()));
}

#[test]
fn a_queue_that_cannot_be_is_refused_at_driver_ok() {
    if !on_kvm() {
        return skip("a_queue_that_cannot_be_is_refused_at_driver_ok", "the transport is QEMU's own here");
    }
    let wrong: [fn(&mut Ring); 8] = [
        |ring| ring.descriptors = 0x7000_0000,
        |ring| ring.available = 0xd000_0000,
        |ring| ring.used = u64::MAX - 7,
        |ring| ring.used = MEMORY_BYTES - 8,
        |ring| ring.descriptors = MEMORY_BYTES - 16,
        |ring| ring.descriptors += 8,
        |ring| ring.available += 1,
        |ring| ring.used += 2,
    ];
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        for make_wrong in &wrong {
            let mut rings = victim.rings();
            make_wrong(&mut rings[victim.live]);
            script.negotiate(victim.features);
            rings.iter().for_each(|ring| script.place(ring));
            script.driver_ok();
            script.show(register::STATUS);
            victim.expect_service(&mut script);
            script.say("\n");
        }
    }
    let tap = Tap::new("sbhq");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    let expected = format!("{:08x}\n.\n", status::NEEDS_RESET | 0xf);
    assert_eq!(report, expected.repeat(wrong.len() * victims().len()));
}

#[test]
fn tables_that_lie_on_top_of_each_other_harm_only_the_guest() {
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        let overlaps: [fn(&mut Ring); 3] = [
            |ring| ring.used = ring.descriptors,
            |ring| ring.available = ring.descriptors,
            |ring| ring.available = ring.used,
        ];
        for overlap in overlaps {
            let mut rings = victim.rings();
            let mut plain = victim.rings();
            script.bring_up(victim.features, &mut plain);
            overlap(&mut rings[victim.live]);
            script.negotiate(victim.features);
            rings.iter().for_each(|ring| script.place(ring));
            script.driver_ok();
            let ring = &mut rings[victim.live];
            for round in 0..4 {
                script.offer_chain(ring, round, &[(ring.used, 4096, flag::WRITE)]);
                script.notify(ring);
            }
            victim.expect_service(&mut script);
        }
    }
    let tap = Tap::new("sbho");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    assert_eq!(report, ".".repeat(3 * victims().len()));
}

#[test]
fn a_queue_that_is_changed_after_driver_ok_stays_what_it_was() {
    if !on_kvm() {
        return skip(
            "a_queue_that_is_changed_after_driver_ok_stays_what_it_was",
            "the transport is QEMU's own here",
        );
    }
    const ELSEWHERE: u32 = 0x0500_0000;
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        let mut rings = victim.rings();
        script.bring_up(victim.features, &mut rings);
        let mut moved = victim.rings();
        for ring in &mut moved {
            ring.size = 1024;
            ring.descriptors = ELSEWHERE.into();
            ring.available = u64::from(ELSEWHERE) + 0x4000;
            ring.used = 0xffff_ffff_f000;
            script.set(register::QUEUE_SELECT, ring.index);
            script.set(register::QUEUE_READY, 0);
            script.place(ring);
        }
        // Neither DRIVER_OK once more nor less of the status makes the change count.
        script.driver_ok();
        script.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let (readable, writable) = victim.request;
        script.copy(DATA, readable);
        let buffers =
            [(DATA.into(), readable.len() as u32, 0), (u64::from(DATA) + 0x1000, writable, flag::WRITE)];
        let ring = &mut rings[victim.live];
        script.offer_chain(ring, 0, &buffers);
        script.notify(ring);
        script.wait_used(ring);
        script.show(register::STATUS);
        victim.expect_service(&mut script);
        script.say("\n");
    }
    let tap = Tap::new("sbhc");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    assert_eq!(report, "0000000f\n.\n".repeat(victims().len()));
}

#[test]
fn a_status_that_skips_a_step_gets_no_further() {
    if !on_kvm() {
        return skip("a_status_that_skips_a_step_gets_no_further", "the transport is QEMU's own here");
    }
    use status::*;
    const ALL: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    // What is written one after the other, and what the status is then.
    let paths: [(&[u32], u32); 7] = [
        (&[DRIVER_OK], 0),
        (&[ALL], 0),
        (&[DRIVER], 0),
        (&[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER | DRIVER_OK], ACKNOWLEDGE),
        (&[ACKNOWLEDGE, ALL], ACKNOWLEDGE),
        (&[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, DRIVER], ACKNOWLEDGE | DRIVER),
        // Without VIRTIO_F_VERSION_1 nothing is agreed.
        (&[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK, ALL], ACKNOWLEDGE | DRIVER),
    ];
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        for (path, _) in paths {
            script.set(register::STATUS, 0);
            path.iter().for_each(|&status| script.set(register::STATUS, status));
            script.set(register::NOTIFY, 0);
            script.show(register::STATUS);
        }
        // Features that were never offered.
        script.negotiate(0xffff_ffff);
        script.driver_ok();
        script.show(register::STATUS);
        victim.expect_service(&mut script);
        script.say("\n");
    }
    let tap = Tap::new("sbhs");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    let mut expected: String = paths.iter().map(|(_, status)| format!("{status:08x}\n")).collect();
    expected += "00000003\n.\n";
    assert_eq!(report, expected.repeat(victims().len()));
}

#[test]
fn registers_that_are_written_with_nonsense_harm_no_device() {
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        let mut rings = victim.rings();
        for state in 0..3 {
            match state {
                0 => script.set(register::STATUS, 0),
                1 => script.negotiate(victim.features),
                _ => script.bring_up(victim.features, &mut rings),
            }
            for value in [u32::MAX, 0x8000_0001] {
                for at in (0..register::END).step_by(4).filter(|&at| at != register::STATUS) {
                    script.set(at, value);
                    script.set_narrow(at + 1, value);
                }
            }
        }
        victim.expect_service(&mut script);
    }
    let tap = Tap::new("sbhn");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    assert_eq!(report, ".".repeat(victims().len()));
}

#[test]
fn what_no_device_has_reads_as_a_fixed_value_and_never_as_memory_of_the_host() {
    if !on_kvm() {
        return skip(
            "what_no_device_has_reads_as_a_fixed_value_and_never_as_memory_of_the_host",
            "the transport is QEMU's own here",
        );
    }
    let mut script = Script::new();
    for victim in victims() {
        script.select(victim.identity);
        script.show(register::SHARED_MEMORY_LENGTH);
        // Far behind the end of any configuration, and between two registers.
        for at in [0x1f0, 0x7fc, 0xff0, register::STATUS + 1, 0x3c, 0x54] {
            script.show(at);
        }
    }
    for nobody in [0x7000_0000, 0xcfff_fff0, 0xd000_f000, 0xf000_0000] {
        script.report(nobody);
    }
    let tap = Tap::new("sbhm");
    let report = bare::run(script, |config, directory| all_devices(config, directory, &tap));
    let device = format!("ffffffff\n{}", "00000000\n".repeat(6));
    assert_eq!(report, device.repeat(victims().len()) + &"ffffffff\n".repeat(4));
}

#[test]
fn a_device_writes_no_more_than_the_guest_gave_it() {
    const MARK: u32 = 0xa5a5_a5a5;
    const BUFFER: u32 = DATA + 32;
    let mut script = Script::new();
    let around = |script: &mut Script, bytes: u32| {
        script.report(BUFFER - 4);
        script.report(BUFFER + bytes);
    };
    if on_kvm() {
        script.select(device::RNG);
        script.fill(DATA, MARK, 64);
        let mut rings = RNG.rings();
        script.bring_up(0, &mut rings);
        script.offer_chain(&mut rings[0], 0, &[(BUFFER.into(), 40, flag::WRITE)]);
        script.notify(&rings[0]);
        script.wait_used(&rings[0]);
        around(&mut script, 40);
    }
    // A request for a connection is answered by a reset of 44 bytes, for which there is room for 40.
    script.select(device::VSOCK);
    script.fill(DATA, MARK, 64);
    let mut rings = VSOCK.rings();
    script.bring_up(0, &mut rings);
    script.offer_chain(&mut rings[0], 0, &[(BUFFER.into(), 40, flag::WRITE)]);
    script.copy(DATA + 0x1000, &request_packet());
    script.offer_chain(&mut rings[1], 0, &[(u64::from(DATA) + 0x1000, 44, 0)]);
    script.notify(&rings[1]);
    script.wait_used(&rings[1]);
    script.wait_used(&rings[0]);
    around(&mut script, 40);
    let report = bare::run(script, |_, _| {});
    assert_eq!(report, "a5a5a5a5\n".repeat(if on_kvm() { 4 } else { 2 }));
}
