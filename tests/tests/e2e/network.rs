//! The network of a namespace that was prepared for a sandbox, as engines prepare one.

use sandbox_tests::network::{Net, answer, ask, output};
use sandbox_tests::place::{on_kvm, patience};
use sandbox_tests::{leaks, pattern, sandbox};
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::process::Command;

use serde_json::json;

/// Prints what the guest has: interfaces without their index, routes, permanent neighbours.
const SHOW: &str =
    "ip -o link | cut -d' ' -f2-; ip -o addr | tr -s ' ' | cut -d' ' -f2-4; ip route; ip -6 route; ip neigh";

#[test]
fn a_guest_has_the_interfaces_of_its_namespace() {
    let net = Net::new();
    net.join(0);
    net.join(1);
    net.inside.ip("link set eth0 mtu 1400");
    net.inside.ip("link set eth1 address 02:00:00:00:00:42");
    net.inside.ip("addr add 198.18.0.3/32 dev eth0");
    net.inside.ip("route add default via 198.18.0.1");
    net.inside.ip("route add 203.0.113.0/24 via 198.18.1.9 metric 7");
    net.inside.ip("route add 192.0.2.1 dev eth1 scope link");
    net.inside.ip("route add 192.0.2.128/25 via 192.0.2.9 dev eth1 onlink src 198.18.1.2");
    net.inside.ip("route add blackhole 192.0.2.64/26");
    net.inside.ip("route add default via fd00:0::1");
    net.inside.ip("neigh add 198.18.1.9 lladdr 02:00:00:00:00:09 dev eth1");
    net.inside.ip("neigh add fd00:1::9 lladdr 02:00:00:00:00:09 dev eth1");
    let mac = net.inside.ip("-o link show eth0");
    let mac = mac
        .split("link/ether ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .expect("an address")
        .to_owned();

    let outcome = sandbox("net-shown").network(&net.inside).run(["sh", "-c", SHOW]).expect_code(0);
    let shown = outcome.out();
    let has = |line: &str| {
        let found = shown.lines().any(|l| l.split_whitespace().collect::<Vec<_>>().join(" ").contains(line));
        assert!(found, "{line:?} is missing\n{outcome}");
    };
    has("mtu 1400");
    has(&format!("link/ether {mac}"));
    has("link/ether 02:00:00:00:00:42");
    for line in [
        "lo inet 127.0.0.1/8",
        "eth0 inet 198.18.0.2/24",
        "eth0 inet 198.18.0.3/32",
        "eth0 inet6 fd00::2/64",
        "eth1 inet 198.18.1.2/24",
        "eth1 inet6 fd00:1::2/64",
        "default via 198.18.0.1 dev eth0",
        "203.0.113.0/24 via 198.18.1.9 dev eth1 metric 7",
        "192.0.2.1 dev eth1 scope link",
        "192.0.2.128/25 via 192.0.2.9 dev eth1 src 198.18.1.2 onlink",
        "blackhole 192.0.2.64/26",
        "default via fd00::1 dev eth0",
        "198.18.1.9 dev eth1 lladdr 02:00:00:00:00:09",
        "fd00:1::9 dev eth1 lladdr 02:00:00:00:00:09",
    ] {
        has(line);
    }
    // One link-local address each, that of the namespace; no interface besides; nothing is tried out first.
    assert_eq!(shown.lines().filter(|line| line.contains("inet6 fe80")).count(), 2, "{outcome}");
    assert_eq!(shown.lines().filter(|line| line.contains("link/")).count(), 3, "{outcome}");
    assert!(!shown.contains("tentative"), "{outcome}");
}

#[test]
fn guest_and_world_talk_both_ways_over_both_protocols() {
    let net = Net::new();
    net.join(0);
    let script = "echo from the guest | nc 198.18.0.1 5000; echo six | nc fd00::1 5000
        for i in 4 6; do nc -l -p 600$i -e sh -c 'read line; echo \"the guest heard $line\"'; done";
    let servers = [net.outside.listen("198.18.0.1:5000"), net.outside.listen("[fd00::1]:5000")];
    let mut guest = sandbox("net-talk");
    guest = guest.network(&net.inside);
    let process = guest.spawn(["sh", "-c", script]);
    let heard = servers.map(|server| answer(server.accept(), b"from the world\n"));
    assert_eq!(heard, ["from the guest\n", "six\n"]);
    for address in ["198.18.0.2:6004", "[fd00::2]:6006"] {
        assert_eq!(ask(net.outside.connect(address), b"the world\n"), "the guest heard the world\n");
    }
    process.wait().expect_stdout("from the world\nfrom the world\n");
}

#[test]
fn large_transfers_arrive_whole_in_both_directions() {
    // Two emulations, one in the other, would take minutes for as much.
    let bytes: usize = if on_kvm() { 24 << 20 } else { 1 << 30 };
    let net = Net::new();
    net.join(0);
    let servers = [net.outside.listen("198.18.0.1:5000"), net.outside.listen("198.18.0.1:5001")];
    let guest = sandbox("net-bulk").network(&net.inside);
    let script = format!(
        "nc 198.18.0.1 5000 -e probe checksum && nc 198.18.0.1 5001 -e probe pattern {bytes} && probe offloads &&
            cut -c8,9,12,13 /sys/class/net/eth0/device/features"
    );
    let process = guest.spawn(["sh", "-c", &script]);
    let mut to = servers[0].accept();
    to.set_write_timeout(Some(patience())).expect("a time-out");
    to.set_read_timeout(Some(patience())).expect("a time-out");
    pattern::write(&mut to, bytes).expect("the guest takes it");
    to.shutdown(Shutdown::Write).expect("the guest hears its end");
    let mut sum = String::new();
    to.read_to_string(&mut sum).expect("the guest answers");
    let expected = pattern::checksum_of(bytes);
    assert_eq!(sum.trim(), expected);
    let mut from = servers[1].accept();
    from.set_read_timeout(Some(patience())).expect("a time-out");
    assert_eq!(pattern::checksum(&mut from).expect("the guest sends"), expected);
    drop(from);
    // The device takes segments and gives them, each by IPv4 and by IPv6.
    process.wait().expect_stdout("rx-checksum on\ntx-checksum on\ntcp-segmentation on\n1111\n");
}

#[test]
fn thousands_of_short_connections_are_served() {
    // Two emulations, one in the other, take ten times as long.
    let connections: usize = if on_kvm() { 1_000 } else { 10_000 };
    let net = Net::new();
    net.join(0);
    let server = net.outside.listen("198.18.0.1:5000");
    let guest = sandbox("net-many").network(&net.inside);
    let process = guest.spawn(["probe", "connections", "198.18.0.1:5000", &connections.to_string()]);
    for number in 0..connections {
        let mut stream = server.accept();
        let mut word = [0; 8];
        stream.read_exact(&mut word).unwrap_or_else(|e| panic!("connection {number}: {e}"));
        stream.write_all(&word).expect("the guest listens");
        assert_eq!(word, number.to_le_bytes());
    }
    process.wait().expect_code(0);
}

#[test]
fn a_container_with_a_user_namespace_uses_the_network_that_it_has_no_power_over() {
    const ROOT: u32 = 100_000;
    let net = Net::new();
    net.join(0);
    let sandbox = sandbox("net-user").network(&net.inside).config(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.push(json!({"type": "user"}));
        for ids in ["uidMappings", "gidMappings"] {
            config["linux"][ids] = json!([{"containerID": 0, "hostID": ROOT, "size": 65536}]);
        }
        config["linux"]["sysctl"] = json!({"net.ipv4.ip_default_ttl": "77"});
    });
    let script = "cat /proc/sys/net/ipv4/ip_default_ttl; ls /sys/class/net; ip link set eth0 down 2>/dev/null || echo no
        nc -l -p 80 -e echo from a low port";
    let process = sandbox.spawn(["sh", "-c", script]);
    assert_eq!(ask(net.outside.connect("198.18.0.2:80"), b""), "from a low port\n");
    process.wait().expect_stdout("77\neth0\nlo\nno\n");
}

#[test]
fn what_is_attached_between_creation_and_start_is_there_too() {
    let net = Net::new();
    net.join(0);
    let sandbox = sandbox("net-late").network(&net.inside).command(["sh", "-c", SHOW]);
    let container = sandbox.create();
    net.join(1);
    net.inside.ip("addr add 198.18.0.7/24 dev eth0");
    net.inside.ip("route add default via 198.18.1.1");
    sandbox.on("start", []).expect_stdout("");
    assert_eq!(container.monitor.wait(), 0);
    let shown = container.streams.wait().out();
    for line in [
        "eth0 inet 198.18.0.2/24",
        "eth0 inet 198.18.0.7/24",
        "eth1 inet 198.18.1.2/24",
        "default via 198.18.1.1 dev eth1",
    ] {
        assert!(shown.contains(line), "{line:?} is missing\n{shown}");
    }
    sandbox.on("delete", []).expect_stdout("");
}

#[test]
fn an_engine_fills_the_namespace_of_what_stands_for_a_container() {
    let net = Net::new();
    let sandbox = sandbox("net-new").command(["sh", "-c", "echo filled | nc 198.18.0.1 5000"]);
    let container = sandbox.create();
    let pid = container.monitor.pid();
    assert_ne!(fs::read_link(format!("/proc/{pid}/ns/net")).ok(), fs::read_link("/proc/self/ns/net").ok());
    net.outside.ip(&format!("link add v0 type veth peer name eth0 netns {pid}"));
    net.outside.ip("addr add 198.18.0.1/24 dev v0");
    net.outside.ip("link set v0 up");
    for words in ["addr add 198.18.0.2/24 dev eth0", "link set eth0 up"] {
        let mut ip = Command::new("nsenter");
        output(ip.arg(format!("--net=/proc/{pid}/ns/net")).arg("ip").args(words.split(' ')));
    }
    let server = net.outside.listen("198.18.0.1:5000");
    sandbox.on("start", []).expect_stdout("");
    assert_eq!(answer(server.accept(), b"heard\n"), "filled\n");
    assert_eq!(container.monitor.wait(), 0);
    assert_eq!(container.streams.wait().out(), "heard\n");
    sandbox.on("delete", []).expect_stdout("");
}

#[test]
fn an_empty_namespace_has_loopback_only_until_it_is_filled() {
    let net = Net::new();
    let sandbox = sandbox("net-empty").network(&net.inside);
    let show = "ip -o link show up | cut -d' ' -f2; nc 127.0.0.1 1 2>&1 | grep -o refused";
    sandbox.run(["sh", "-c", show]).expect_stdout("lo:\nrefused\n");
    let sandbox = sandbox.command(["sh", "-c", "ip -o addr show dev eth0"]);
    let container = sandbox.create();
    net.join(0);
    sandbox.on("start", []).expect_stdout("");
    assert_eq!(container.monitor.wait(), 0);
    assert!(container.streams.wait().out().contains("198.18.0.2/24"));
    sandbox.on("delete", []).expect_stdout("");
}

#[test]
fn a_namespace_that_cannot_be_had_is_an_error_that_says_why() {
    let net = Net::new();
    net.join(0);
    let fails = |path: &str, words: &[&str]| {
        let sandbox = sandbox("net-none").network_at(path);
        sandbox.run(["true"]).expect_error(125, words);
        sandbox.create_in_vain().expect_error(1, words);
    };
    fails(
        "/run/netns/no-such-namespace",
        &["/run/netns/no-such-namespace", "linux.namespaces", "No such file"],
    );
    fails("/proc/self/ns/uts", &["/proc/self/ns/uts", "no network namespace"]);
    fails("/etc/passwd", &["/etc/passwd", "no network namespace"]);
    fails("/proc/self/ns/net", &["/proc/self/ns/net", "host's own network", "--network none"]);
    fails("relative", &["linux.namespaces[", "not an absolute path"]);
    for number in 1..10 {
        net.join(number);
    }
    fails(&net.inside.path(), &["10 interfaces", "room for 8"]);
}

#[test]
fn one_namespace_leads_into_one_machine_at_a_time() {
    let net = Net::new();
    net.join(0);
    let first = sandbox("net-first").network(&net.inside).command(["sleep", "1000"]);
    let container = first.start();
    let second = sandbox("net-second").network(&net.inside);
    second.run(["true"]).expect_error(125, &[&net.inside.path(), &first.id, "another sandbox"]);
    container.end();
    second.run(["true"]).expect_code(0);
}

#[test]
fn a_killed_sandbox_leaves_a_namespace_that_works_again() {
    let net = Net::new();
    net.join(0);
    let sandbox = sandbox("net-killed").network(&net.inside).command(["sleep", "1000"]);
    let container = sandbox.start();
    assert!(!net.inside.traces().is_empty());
    nix::sys::signal::kill(container.monitor.pid(), nix::sys::signal::Signal::SIGKILL).expect("it is there");
    container.monitor.wait();
    leaks::expect_no_process(&sandbox.trace());
    sandbox.on("delete", []).expect_stdout("");
    assert_eq!(net.inside.traces(), Vec::<String>::new());

    // Without a deletion in between, the next one takes the place of what is left.
    let container = sandbox.start();
    nix::sys::signal::kill(container.monitor.pid(), nix::sys::signal::Signal::SIGKILL).expect("it is there");
    container.monitor.wait();
    leaks::expect_no_process(&sandbox.trace());
    let server = net.outside.listen("198.18.0.1:5000");
    let next = sandbox_tests::sandbox("net-next").network(&net.inside);
    let process = next.spawn(["sh", "-c", "echo again | nc 198.18.0.1 5000"]);
    assert_eq!(answer(server.accept(), b"yes\n"), "again\n");
    process.wait().expect_stdout("yes\n");
    sandbox.on("delete", []).expect_stdout("");
}
