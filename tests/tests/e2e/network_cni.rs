//! Networks by Debian's CNI plugins: bridge, host-local, portmap and loopback.

use sandbox_tests::cni::{self, Cni};
use sandbox_tests::network::{Namespace, answer, ask, output};
use sandbox_tests::{sandbox, skip};

/// Answers every connection to port 80 with a line, until it is killed.
const SERVE: [&str; 3] = ["sh", "-c", "exec nc -ll -p 80 -e sh -c 'read line; echo served $line'"];

#[test]
fn sandboxes_on_a_bridge_talk_to_each_other_to_the_host_and_through_published_ports() {
    if let Some(why) = cni::missing() {
        return skip("network_cni", why);
    }
    let host = Namespace::new();
    let (server, client) = (sandbox("cni-server"), sandbox("cni-client"));
    let data = server.directory().join("ipam");
    std::fs::create_dir(&data).expect("a directory");
    let cni = Cni::new(&host, &data);
    let (there, here) = (cni.attach("server", &[(8080, 80)]), cni.attach("client", &[]));
    let server = server.network(&there.namespace).command(SERVE);
    let client = client.network(&here.namespace);
    let container = server.start();

    // From the host, directly and by an address of the host's.
    let address = there.address();
    assert_eq!(ask(host.connect(&format!("{address}:80")), b"directly\n"), "served directly\n");
    host.ip("addr add 192.0.2.1/32 dev lo");
    assert_eq!(ask(host.connect("192.0.2.1:8080"), b"published\n"), "served published\n");
    // From one sandbox to the other, both ways, and out to the host.
    let listener = host.listen("192.0.2.1:5000");
    let script = format!(
        "echo over the bridge | nc {address} 80; echo by the port | nc 192.0.2.1 8080; echo out | nc 192.0.2.1 5000"
    );
    let process = client.spawn(["sh", "-c", &script]);
    let stream = listener.accept();
    assert_eq!(answer(stream, b"and back\n"), "out\n");
    process.wait().expect_stdout("served over the bridge\nserved by the port\nand back\n");
    // What the plugins count goes through the interface that they have made.
    let counted = there.namespace.ip("-s -o link show eth0");
    assert!(!counted.contains("RX: bytes packets errors dropped missed mcast 0 0"), "{counted}");
    container.end();

    drop((there, here));
    let rules = output(host.command("iptables").args(["-t", "nat", "-S"]));
    assert!(!rules.contains("10.22."), "rules are left: {rules}");
    assert!(!host.ip("-o link").contains("veth"), "a veth is left");
}
