//! A guest that owns its kernel looks for addresses of the host in all that it can read.

use std::fs;
use std::ops::Range;

use sandbox_tests::bare::victim::{Tap, Victim, all_devices, request_packet, victims};
use sandbox_tests::bare::{self, DATA, MEMORY_BYTES, Script, flag, register};
use sandbox_tests::leaks;
use sandbox_tests::vmm::Machine;

use crate::hostile_files::{message, opcode, words};

/// What the guest puts into its own memory, and has to find.
const PLANTED: u64 = 0x5500_dead_beef;
const PLANTED_AT: u32 = 40 << 20;

/// Where answers go, with more room than they have bytes.
const ANSWER: u32 = DATA + 0x10_0000;
const ROOM: u32 = 64 << 10;

/// Requests to a device that are answered in different ways: the bytes to be read, and the room for the answer.
fn requests(victim: &Victim) -> Vec<(Vec<u8>, u32)> {
    match victim.name {
        "rng" => vec![(vec![], ROOM)],
        // A read of the whole disk, a flush, its identity, and what does not exist.
        "blk" => {
            let request = |kind: u8| [&[kind][..], &[0; 15]].concat();
            vec![(request(0), ROOM + 1), (request(4), 1), (request(8), 21), (request(99), ROOM)]
        }
        "vsock" => vec![(request_packet(), 0), (vec![0xff; 44], 0)],
        "fs" => file_requests().into_iter().map(|request| (request, ROOM)).collect(),
        _ => vec![(victim.request.0.to_vec(), victim.request.1)],
    }
}

/// A session of FUSE (`linux/fuse.h`): what there is to be known of a directory, an entry and a file, whose nodes and
/// handles are small numbers, and some that nobody has.
fn file_requests() -> Vec<Vec<u8>> {
    use opcode::*;
    let init = [words(&[7, 41, 128 << 10, u32::MAX]), vec![0; 48]].concat();
    let mut requests = vec![message(INIT, 0, &[&init]), message(STATFS, 1, &[])];
    for node in 1..4 {
        for name in ["shared\0", "file\0", "nothing\0"] {
            requests.push(message(LOOKUP, node, &[name.as_bytes()]));
        }
        for opcode in [GETATTR, READLINK, OPEN, OPENDIR] {
            requests.push(message(opcode, node, &[&[0; 16]]));
        }
        for handle in 0..4 {
            for opcode in [READ, READDIR, READDIRPLUS] {
                requests.push(message(opcode, node, &[&words(&[handle, 0, 0, 0, 4096, 0, 0, 0, 0, 0])]));
            }
        }
        for name in ["\0", "user.none\0"] {
            requests.push(message(GETXATTR, node, &[&words(&[4096, 0]), name.as_bytes()]));
        }
    }
    requests
}

/// Has a device answer, each answer into memory of its own queue, and looks at all that it wrote.
fn look_at_answers(script: &mut Script, victim: &Victim) {
    let mut rings = victim.rings();
    script.bring_up(victim.features, &mut rings);
    for &queue in victim.unheeded {
        let room = (u64::from(ANSWER) + 0x1_0000 * (1 + queue as u64), 4096, flag::WRITE);
        script.offer_chain(&mut rings[queue], 0, &[room]);
        script.notify(&rings[queue]);
    }
    for (readable, writable) in requests(victim) {
        script.ask(&mut rings[victim.live], &readable, (ANSWER, writable));
        script.find_addresses(ANSWER, ROOM);
    }
    script.find_addresses_in_registers(register::END);
}

/// Where the processes of a machine have something mapped.
fn mappings(machine: &Machine) -> Vec<Range<u64>> {
    let address = |text: &str| u64::from_str_radix(text, 16).expect("an address");
    let mut mappings = vec![];
    for (pid, _) in leaks::processes(&machine.trace()) {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process of the machine");
        mappings.extend(maps.lines().map(|line| {
            let (start, rest) = line.split_once('-').expect("a range");
            address(start)..address(rest.split(' ').next().expect("its end"))
        }));
    }
    mappings
}

#[test]
fn no_address_of_the_host_is_in_a_guest_s_memory_or_its_registers() {
    let mut script = Script::new();
    script.write32(PLANTED_AT, PLANTED as u32);
    script.write32(PLANTED_AT + 4, (PLANTED >> 32) as u32);
    for victim in victims() {
        script.select(victim.identity);
        look_at_answers(&mut script, &victim);
    }
    script.find_addresses(0, MEMORY_BYTES as u32);
    script.say("all\n");
    script.halt();
    let tap = Tap::new("sbhp");
    let mut machine = bare::start(script, |config, directory| {
        all_devices(config, directory, &tap);
        fs::write(directory.join("shared/file"), "a file of the host").unwrap();
    });
    machine.expect_running();
    bare::wait_for(&machine, "all\n");
    let report = bare::report(&machine);
    let found = report.lines().take_while(|line| *line != "all").map(|line| line.split_once(' ').unwrap().1);
    let found: Vec<u64> = found.map(|value| u64::from_str_radix(value, 16).unwrap()).collect();
    assert!(found.contains(&PLANTED), "{report}");
    let mappings = mappings(&machine);
    let guest_memory = |mapping: &Range<u64>| mapping.end - mapping.start >= MEMORY_BYTES;
    assert!(mappings.iter().any(guest_memory), "{mappings:x?}");
    for address in found {
        let mapping = mappings.iter().find(|mapping| mapping.contains(&address));
        assert_eq!(mapping, None, "{address:x} is an address of the host, in\n{report}");
    }
}
