use super::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const OFFERED: u64 = VERSION_1 | 0b101;

fn registers() -> Registers {
    Registers::new(4, OFFERED, &[256, 64])
}

/// Steps of a driver, each on top of those before.
#[derive(Clone, Copy)]
enum Step {
    Reset,
    Driver,
    FeaturesOk,
    DriverOk,
}

fn at(step: Step) -> Registers {
    let mut registers = registers();
    if matches!(step, Step::Reset) {
        return registers;
    }
    registers.write(offset::STATUS, ACKNOWLEDGE);
    registers.write(offset::STATUS, DRIVING);
    if matches!(step, Step::Driver) {
        return registers;
    }
    accept(&mut registers, VERSION_1);
    registers.write(offset::STATUS, NEGOTIATED);
    if matches!(step, Step::DriverOk) {
        registers.write(offset::STATUS, NEGOTIATED | DRIVER_OK);
    }
    registers
}

fn accept(registers: &mut Registers, features: u64) {
    for half in 0..2 {
        registers.write(offset::DRIVER_FEATURES_SEL, half);
        registers.write(offset::DRIVER_FEATURES, (features >> (32 * half)) as u32);
    }
}

#[test]
fn a_device_says_what_it_is() {
    let mut registers = registers();
    let read = |offset| registers.read(offset);
    assert_eq!([read(0), read(4), read(8)], [0x7472_6976, 2, 4]);
    assert_eq!(registers.read(offset::DEVICE_FEATURES), 0b101);
    registers.write(offset::DEVICE_FEATURES_SEL, 1);
    assert_eq!(registers.read(offset::DEVICE_FEATURES), 1);
    registers.write(offset::DEVICE_FEATURES_SEL, 2);
    assert_eq!(registers.read(offset::DEVICE_FEATURES), 0);
    assert_eq!(registers.read(0xb0), u32::MAX);
    assert_eq!(registers.read(0x1c), 0);
}

#[test]
fn status_bits_come_one_at_a_time_and_in_order() {
    // From a status, a write, and what the status is then.
    let cases = [
        (Step::Reset, ACKNOWLEDGE, ACKNOWLEDGE),
        (Step::Reset, DRIVER, 0),
        (Step::Reset, DRIVING, 0),
        (Step::Reset, DRIVER_OK, 0),
        (Step::Driver, NEGOTIATED | DRIVER_OK, DRIVING),
        (Step::Driver, DRIVING | DRIVER_OK, DRIVING),
        (Step::Driver, ACKNOWLEDGE, DRIVING),
        (Step::FeaturesOk, NEGOTIATED, NEGOTIATED),
        (Step::FeaturesOk, DRIVING, NEGOTIATED),
        (Step::FeaturesOk, NEGOTIATED | DRIVER_OK, NEGOTIATED | DRIVER_OK),
        (Step::DriverOk, NEGOTIATED, NEGOTIATED | DRIVER_OK),
        (Step::DriverOk, NEGOTIATED | DRIVER_OK | FAILED, NEGOTIATED | DRIVER_OK | FAILED),
        (Step::FeaturesOk, NEGOTIATED | NEEDS_RESET, NEGOTIATED),
        (Step::FeaturesOk, NEGOTIATED | 0x10, NEGOTIATED),
    ];
    for (index, (step, write, expected)) in cases.into_iter().enumerate() {
        let mut registers = at(step);
        registers.write(offset::STATUS, write);
        assert_eq!(registers.read(offset::STATUS), expected, "case {index}");
    }
}

#[test]
fn only_driver_ok_activates_and_only_once() {
    let mut registers = at(Step::FeaturesOk);
    assert_eq!(registers.write(offset::STATUS, NEGOTIATED | DRIVER_OK), Effect::Activate);
    assert_eq!(registers.write(offset::STATUS, NEGOTIATED | DRIVER_OK), Effect::None);
    assert_eq!(at(Step::Reset).write(offset::STATUS, NEGOTIATED | DRIVER_OK), Effect::None);
}

#[test]
fn a_failed_driver_has_to_reset() {
    let mut registers = at(Step::FeaturesOk);
    registers.write(offset::STATUS, NEGOTIATED | FAILED);
    assert_eq!(registers.write(offset::STATUS, NEGOTIATED | FAILED | DRIVER_OK), Effect::None);
    assert_eq!(registers.write(offset::STATUS, 0), Effect::Reset);
    assert_eq!(registers.read(offset::STATUS), 0);
}

#[test]
fn features_must_be_offered_and_modern() {
    for (features, accepted) in [(VERSION_1, true), (OFFERED, true), (0b1, false), (VERSION_1 | 0b10, false)]
    {
        let mut registers = at(Step::Driver);
        accept(&mut registers, features);
        registers.write(offset::STATUS, NEGOTIATED);
        assert_eq!(registers.read(offset::STATUS) & FEATURES_OK != 0, accepted, "{features:#x}");
    }
}

#[test]
fn features_are_final_once_they_are_accepted() {
    for step in [Step::Reset, Step::FeaturesOk, Step::DriverOk] {
        let mut registers = at(step);
        let before = registers.accepted();
        accept(&mut registers, OFFERED);
        assert_eq!(registers.accepted(), before);
    }
}

#[test]
fn queues_are_set_up_only_between_features_ok_and_driver_ok() {
    for (step, changes) in
        [(Step::Reset, false), (Step::Driver, false), (Step::FeaturesOk, true), (Step::DriverOk, false)]
    {
        let mut registers = at(step);
        registers.write(offset::QUEUE_NUM, 16);
        registers.write(offset::QUEUE_DESC_LOW, 0x1000);
        registers.write(offset::QUEUE_DESC_HIGH, 1);
        registers.write(offset::QUEUE_DRIVER_LOW, 0x2000);
        registers.write(offset::QUEUE_DEVICE_LOW, 0x3000);
        registers.write(offset::QUEUE_READY, 1);
        let queue = registers.queues()[0];
        if changes {
            let expected = QueuePlan {
                max_size: 256,
                size: 16,
                ready: true,
                descriptors: 0x1_0000_1000,
                available: 0x2000,
                used: 0x3000,
            };
            assert_eq!(queue, expected);
        } else {
            assert_eq!((queue.size, queue.ready, queue.descriptors), (256, false, 0));
        }
    }
}

#[test]
fn a_ready_queue_is_not_changed() {
    let mut registers = at(Step::FeaturesOk);
    registers.write(offset::QUEUE_READY, 1);
    registers.write(offset::QUEUE_NUM, 16);
    registers.write(offset::QUEUE_DESC_LOW, 0x1000);
    assert_eq!((registers.queues()[0].size, registers.queues()[0].descriptors), (256, 0));
    registers.write(offset::QUEUE_READY, 0);
    registers.write(offset::QUEUE_NUM, 16);
    assert_eq!(registers.queues()[0].size, 16);
}

#[test]
fn sizes_that_are_none_are_ignored() {
    for size in [0, 3, 512, 0x1_0010, u32::MAX] {
        let mut registers = at(Step::FeaturesOk);
        registers.write(offset::QUEUE_NUM, size);
        assert_eq!(registers.queues()[0].size, 256, "{size}");
    }
}

#[test]
fn a_queue_that_is_not_there_reads_as_zero_and_changes_nothing() {
    let mut registers = at(Step::FeaturesOk);
    for select in [2, u32::MAX] {
        registers.write(offset::QUEUE_SEL, select);
        registers.write(offset::QUEUE_READY, 1);
        assert_eq!(registers.read(offset::QUEUE_NUM_MAX), 0);
        assert_eq!(registers.read(offset::QUEUE_READY), 0);
    }
    registers.write(offset::QUEUE_SEL, 1);
    assert_eq!(registers.read(offset::QUEUE_NUM_MAX), 64);
}

#[test]
fn a_broken_device_cannot_be_brought_up_without_a_reset() {
    let mut registers = at(Step::FeaturesOk);
    registers.set_needs_reset();
    assert_eq!(registers.write(offset::STATUS, NEGOTIATED | DRIVER_OK), Effect::None);
    registers.write(offset::STATUS, 0);
    assert_eq!(registers.read(offset::STATUS), 0);
}

/// Whatever is written in whatever order, a device runs only with features that it offered, and a running
/// device's queues stay as they are.
#[test]
fn random_drivers_get_nowhere_they_should_not() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let interesting = [0, 1, 2, 3, 4, 8, 11, 15, 0x40, 0x80, 16, 0x1000, u32::MAX];
    let mut activations = 0;
    for _ in 0..300 {
        let mut registers = registers();
        let mut running: Option<Vec<QueuePlan>> = None;
        for _ in 0..300 {
            // Half of the writes are those of a driver that makes progress.
            let status = registers.read(offset::STATUS);
            let next =
                [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK].into_iter().find(|bit| status & bit == 0);
            let (offset, value) = match random() % 8 {
                0..=2 => (offset::STATUS, status | next.unwrap_or(0)),
                3 => (offset::DRIVER_FEATURES_SEL, (random() % 2) as u32),
                4 => (offset::DRIVER_FEATURES, 1),
                _ => ((random() % 64) * 4, interesting[(random() % interesting.len() as u64) as usize]),
            };
            match registers.write(offset, value) {
                Effect::Activate => {
                    assert_eq!(registers.accepted() & !OFFERED, 0);
                    assert!(registers.accepted() & VERSION_1 != 0);
                    running = Some(registers.queues().to_vec());
                    activations += 1;
                }
                Effect::Reset => running = None,
                Effect::None => {}
            }
            if let Some(plans) = &running {
                assert_eq!(registers.queues(), plans);
            }
            registers.read(offset);
        }
    }
    assert!(activations > 0);
}
