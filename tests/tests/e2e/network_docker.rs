//! Docker's networks, which it sets up in the namespace of a container that has been created: the default one, and one of
//! `docker network create`.

use sandbox_tests::Docker;
use sandbox_tests::docker::IMAGE;
use sandbox_tests::network::ask;

/// Answers every connection to port 80 with a line, until it is told to end.
const SERVE: &str = "trap 'exit 0' TERM; echo ready
    nc -ll -p 80 -e sh -c 'read line; echo served $line' & wait $!";

#[test]
fn containers_have_dockers_network_with_published_ports() {
    let Some(docker) = Docker::with_network("docker-network") else { return };
    let host = docker.host();
    host.ip("addr add 192.0.2.1/32 dev lo");
    // It has both networks, and one more container the second one alone.
    docker.line("network create own").expect_code(0);
    docker.docker(["create", "--name", "web", "-p", "8080:80", IMAGE, "sh", "-c", SERVE]).expect_code(0);
    docker.line("network connect own web").expect_code(0);
    docker.line("start web").expect_code(0);
    docker.wait_for_log("web", "ready");
    let address = docker.inspect("web", "{{.NetworkSettings.IPAddress}}");
    assert_eq!(ask(host.connect(&format!("{address}:80")), b"directly\n"), "served directly\n");
    assert_eq!(ask(host.connect("192.0.2.1:8080"), b"published\n"), "served published\n");
    let script = format!("echo bridge | nc {address} 80; echo port | nc 192.0.2.1 8080");
    docker.run("--rm", &script).expect_stdout("served bridge\nserved port\n");
    let own = docker.inspect("web", "{{.NetworkSettings.Networks.own.IPAddress}}");
    let client = docker.run("--rm --network own", &format!("echo own | nc {own} 80"));
    client.expect_stdout("served own\n");
    let shown = docker.exec("web", "ip -o -4 addr").expect_code(0).out();
    assert!(shown.contains(&address) && shown.contains(&own), "{shown}");
    docker.line("rm --force web").expect_code(0);
    docker.line("network rm own").expect_code(0);
    assert!(!host.ip("-o link").contains("veth"), "a veth is left");
}
