//! Debian's plugins of the Container Network Interface, called as an engine calls them.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::network::{Namespace, output};

/// Where Debian puts them.
const DEBIANS_PLACE: &str = "/usr/lib/cni";

/// Where they are: where `SANDBOX_TEST_CNI` says, or where Debian puts them.
pub fn programs() -> PathBuf {
    std::env::var_os("SANDBOX_TEST_CNI").map_or_else(|| DEBIANS_PLACE.into(), PathBuf::from)
}

/// The network of the documentation's example: a bridge with addresses of its own, and the way out behind the host's.
pub struct Cni<'a> {
    host: &'a Namespace,
    /// Where addresses that are taken are written down.
    data: PathBuf,
}

/// A namespace with an interface of such a network. Dropping it takes the interface away.
pub struct Attached<'a> {
    cni: &'a Cni<'a>,
    /// The namespace.
    pub namespace: Namespace,
    id: String,
    ports: Value,
    result: Value,
}

/// Why they cannot be used here, if they cannot.
pub fn missing() -> Option<&'static str> {
    missing_in(&programs())
}

/// The same for an engine, which looks where Debian puts them and nowhere else.
pub fn missing_for_engines() -> Option<&'static str> {
    missing_in(Path::new(DEBIANS_PLACE))
}

fn missing_in(place: &Path) -> Option<&'static str> {
    let there = place.join("bridge").exists() && Path::new("/usr/sbin/iptables").exists();
    (!there).then_some("CNI plugins are missing: apt-get install containernetworking-plugins iptables")
}

impl<'a> Cni<'a> {
    /// The network in a namespace that takes the host's place, with its data in a directory of the test.
    pub fn new(host: &'a Namespace, data: &Path) -> Self {
        Self { host, data: data.to_owned() }
    }

    /// A namespace with an interface `eth0`; `ports` are pairs of a port of the host and one of the container.
    pub fn attach(&self, id: &str, ports: &[(u16, u16)]) -> Attached<'_> {
        let namespace = Namespace::new();
        let ports = ports
            .iter()
            .map(|(host, own)| json!({"hostPort": host, "containerPort": own, "protocol": "tcp"}))
            .collect();
        let mut attached = Attached {
            cni: self,
            namespace,
            id: id.to_owned(),
            ports: Value::Array(ports),
            result: Value::Null,
        };
        attached.call(
            "ADD",
            "loopback",
            "lo",
            &json!({"cniVersion": "0.2.0", "name": "lo", "type": "loopback"}),
        );
        attached.result = attached.call("ADD", "bridge", "eth0", &attached.bridge());
        attached.call("ADD", "portmap", "eth0", &attached.portmap());
        attached
    }
}

impl Attached<'_> {
    /// Its IPv4 address.
    pub fn address(&self) -> &str {
        let address = self.result["ip4"]["ip"].as_str().expect("an address");
        address.split('/').next().unwrap_or(address)
    }

    fn bridge(&self) -> Value {
        json!({
            "cniVersion": "0.2.0", "name": "mynet", "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
            "ipam": {
                "type": "host-local", "dataDir": self.cni.data, "subnet": "10.22.0.0/16",
                "routes": [{"dst": "0.0.0.0/0"}]
            }
        })
    }

    fn portmap(&self) -> Value {
        json!({
            "cniVersion": "0.2.0", "name": "mynet", "type": "portmap", "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": self.ports}, "prevResult": self.result
        })
    }

    fn call(&self, verb: &str, plugin: &str, interface: &str, config: &Value) -> Value {
        let file = self.cni.data.with_extension(format!("{}-{plugin}.json", self.id));
        std::fs::write(&file, config.to_string()).expect("a file");
        let mut command = self.cni.host.command(programs().join(plugin));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &self.id).env("CNI_IFNAME", interface);
        command.env("CNI_NETNS", self.namespace.path()).env("CNI_PATH", programs());
        command.stdin(Stdio::from(std::fs::File::open(&file).expect("a file")));
        let said = output(&mut command);
        std::fs::remove_file(file).expect("a file");
        serde_json::from_str(&said).unwrap_or(Value::Null)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.call("DEL", "portmap", "eth0", &self.portmap());
            self.call("DEL", "bridge", "eth0", &self.bridge());
        }
    }
}
