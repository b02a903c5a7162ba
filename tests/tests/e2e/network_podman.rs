//! Podman's networks: the default one, and one of `podman network create`, with names.

use sandbox_tests::Podman;
use sandbox_tests::network::ask;

/// Answers every connection to port 80 with a line, until it is told to end.
const SERVE: &str = "trap 'exit 0' TERM; echo ready
    nc -ll -p 80 -e sh -c 'read line; echo served $line' & wait $!";

#[test]
fn containers_have_podmans_network_with_published_ports() {
    let Some(podman) = Podman::with_network("podman-network") else { return };
    let host = podman.host();
    host.ip("addr add 192.0.2.1/32 dev lo");
    podman.start("web", "-p 8080:80", SERVE);
    podman.wait_for_log("web", "ready");
    let inspected = podman.line("inspect web --format {{.NetworkSettings.IPAddress}}").expect_code(0).out();
    let address = inspected.trim();
    assert_eq!(ask(host.connect(&format!("{address}:80")), b"directly\n"), "served directly\n");
    assert_eq!(ask(host.connect("192.0.2.1:8080"), b"published\n"), "served published\n");

    // Another container: by the bridge, by the published port, and by the name of the host that Podman writes.
    let script = format!(
        "echo bridge | nc {address} 80; echo port | nc 192.0.2.1 8080; echo name | nc host.containers.internal 8080"
    );
    podman.run("--rm", &script).expect_stdout("served bridge\nserved port\nserved name\n");

    // What Podman shows of the network is the container's: its counters, and the addresses that the guest has.
    let stats = podman.line("stats --no-stream --format {{.NetIO}} web").expect_code(0).out();
    assert!(!stats.contains("--") && !stats.starts_with("0B"), "{stats}");
    let shown = podman.exec("web", "ip -o -4 addr show eth0").expect_code(0).out();
    assert!(shown.contains(address), "{shown}");
    podman.line("restart --time 5 web").expect_code(0);
    let inspected = podman.line("inspect web --format {{.NetworkSettings.IPAddress}}").expect_code(0).out();
    assert_eq!(ask(host.connect(&format!("{}:80", inspected.trim())), b"again\n"), "served again\n");
    podman.line("rm --force --time 0 web").expect_code(0);
    assert!(!host.ip("-o link").contains("veth"), "a veth is left");
}

#[test]
fn containers_of_a_network_know_each_other_by_name() {
    let Some(podman) = Podman::with_names("podman-names") else { return };
    podman.line("network create own").expect_code(0);
    podman.start("web", "--network own", SERVE);
    podman.wait_for_log("web", "ready");
    let client = podman.run("--rm --network own", "cat /etc/resolv.conf; echo by name | nc web 80");
    client.expect_code(0).expect_words(&["dns.podman", "served by name\n"]);
    podman.line("rm --force --time 0 web").expect_code(0);
    podman.line("network rm own").expect_code(0);
    assert!(!podman.host().ip("-o link").contains("veth"), "a veth is left");
}
