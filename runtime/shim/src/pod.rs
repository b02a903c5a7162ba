//! What containerd says of a pod to those who make its sandbox: the CRI's `PodSandboxConfig`.
//!
//! Of that large message a dozen fields are of use here, so it is read by the numbers of its fields, which stay as they
//! are, and not by code generated for all of it.

use std::collections::BTreeMap;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{self, Message as _, UnknownValueRef};

/// The name of the message, of the interface's first version. What stands before it differs.
const NAME: &str = "runtime.v1.PodSandboxConfig";

/// How the interface numbers who has a namespace.
const OF_POD: u64 = 0;
const OF_NODE: u64 = 2;

/// A pod to be.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct PodConfig {
    pub name: String,
    pub uid: String,
    pub namespace: String,
    pub hostname: String,
    pub log_directory: String,
    pub dns: Dns,
    pub annotations: BTreeMap<String, String>,
    pub cgroup_parent: String,
    pub sysctls: BTreeMap<String, String>,
    /// What all its containers may use.
    pub limits: Limits,
    /// Whether it has the node's network, process ids and IPC.
    pub node_network: bool,
    pub node_pid: bool,
    pub node_ipc: bool,
    /// Whether its users are others than the node's.
    pub user_namespace: bool,
}

/// Where its programs look names up.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// 0: no limit.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Limits {
    pub cpu_period: i64,
    pub cpu_quota: i64,
    pub cpu_shares: i64,
    pub memory_bytes: i64,
}

/// Why it cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// It is something else, or nothing.
    #[error(
        "the sandbox is described by {0:?}, and not by a {NAME}: it can be made by containerd's service for Kubernetes only"
    )]
    Kind(String),
    /// It is none.
    #[error("the {NAME} of the sandbox cannot be read: {0}")]
    Protocol(#[from] protobuf::Error),
}

impl PodConfig {
    /// Reads it.
    pub fn read(options: Option<&Any>) -> Result<Self, PodError> {
        let options = options.ok_or_else(|| PodError::Kind(String::new()))?;
        if options.type_url.rsplit('/').next() != Some(NAME) {
            return Err(PodError::Kind(options.type_url.clone()));
        }
        let pod = Message::read(&options.value)?;
        let (metadata, dns, linux) = (pod.message(1)?, pod.message(4)?, pod.message(8)?);
        let security = linux.message(2)?;
        let (namespaces, limits) = (security.message(1)?, linux.message(5)?);
        Ok(Self {
            name: metadata.text(1),
            uid: metadata.text(2),
            namespace: metadata.text(3),
            hostname: pod.text(2),
            log_directory: pod.text(3),
            dns: Dns { servers: dns.texts(1), searches: dns.texts(2), options: dns.texts(3) },
            annotations: pod.map(7)?,
            cgroup_parent: linux.text(1),
            sysctls: linux.map(3)?,
            limits: Limits {
                cpu_period: limits.number(1).cast_signed(),
                cpu_quota: limits.number(2).cast_signed(),
                cpu_shares: limits.number(3).cast_signed(),
                memory_bytes: limits.number(4).cast_signed(),
            },
            node_network: namespaces.number(1) == OF_NODE,
            node_pid: namespaces.number(2) == OF_NODE,
            node_ipc: namespaces.number(3) == OF_NODE,
            user_namespace: match namespaces.bytes(5).next() {
                Some(users) => Message::read(users)?.number(1) == OF_POD,
                None => false,
            },
        })
    }
}

/// A message of which the numbers of the fields are known.
struct Message(Empty);

impl Message {
    fn read(bytes: &[u8]) -> Result<Self, protobuf::Error> {
        Empty::parse_from_bytes(bytes).map(Self)
    }

    /// Everything that is there under a number and has a length.
    fn bytes(&self, number: u32) -> impl Iterator<Item = &[u8]> {
        let fields = self.0.special_fields.unknown_fields().iter();
        fields.filter_map(move |(found, value)| match value {
            UnknownValueRef::LengthDelimited(bytes) if found == number => Some(bytes),
            _ => None,
        })
    }

    fn texts(&self, number: u32) -> Vec<String> {
        self.bytes(number).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    /// The last of them counts.
    fn text(&self, number: u32) -> String {
        self.texts(number).pop().unwrap_or_default()
    }

    /// One that is absent is empty.
    fn message(&self, number: u32) -> Result<Self, protobuf::Error> {
        Self::read(self.bytes(number).last().unwrap_or_default())
    }

    fn number(&self, number: u32) -> u64 {
        match self.0.special_fields.unknown_fields().get(number) {
            Some(UnknownValueRef::Varint(value)) => value,
            _ => 0,
        }
    }

    fn map(&self, number: u32) -> Result<BTreeMap<String, String>, protobuf::Error> {
        let entry = |bytes| Self::read(bytes).map(|entry| (entry.text(1), entry.text(2)));
        self.bytes(number).map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field with a length.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    fn number(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    fn read(value: Vec<u8>) -> Result<PodConfig, PodError> {
        PodConfig::read(Some(&Any { type_url: NAME.into(), value, ..Any::default() }))
    }

    #[test]
    fn a_pod_is_read_by_the_numbers_of_its_fields() {
        let metadata = [field(1, b"web"), field(2, b"u1"), field(3, b"shop")].concat();
        let dns = [field(1, b"10.0.0.1"), field(1, b"10.0.0.2"), field(3, b"ndots:5")].concat();
        let annotation = [field(1, b"dev.sandbox.vcpus"), field(2, b"2")].concat();
        let namespaces = [number(1, 2), number(2, 1), field(5, &number(1, 0))].concat();
        let linux = [
            field(1, b"/kubepods"),
            field(2, &field(1, &namespaces)),
            field(3, &[field(1, b"net.ipv4.ip_default_ttl"), field(2, b"7")].concat()),
            field(5, &[number(1, 100), number(4, 64)].concat()),
        ];
        let pod = [
            field(1, &metadata),
            field(2, b"host"),
            field(4, &dns),
            field(7, &annotation),
            field(8, &linux.concat()),
        ];
        let map = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
        let expected = PodConfig {
            name: "web".into(),
            uid: "u1".into(),
            namespace: "shop".into(),
            hostname: "host".into(),
            dns: Dns {
                servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
                options: vec!["ndots:5".into()],
                ..Dns::default()
            },
            annotations: map("dev.sandbox.vcpus", "2"),
            cgroup_parent: "/kubepods".into(),
            sysctls: map("net.ipv4.ip_default_ttl", "7"),
            limits: Limits { cpu_period: 100, memory_bytes: 64, ..Limits::default() },
            node_network: true,
            user_namespace: true,
            ..PodConfig::default()
        };
        assert_eq!(read(pod.concat()).unwrap(), expected);
        assert_eq!(read(Vec::new()).unwrap(), PodConfig::default());
    }

    #[test]
    fn what_is_no_pod_is_refused() {
        assert!(PodConfig::read(None).is_err());
        let other = Any { type_url: "types.example/Other".into(), ..Any::default() };
        assert!(PodConfig::read(Some(&other)).unwrap_err().to_string().contains("types.example/Other"));
        assert!(read(vec![0xff]).is_err());
    }
}
