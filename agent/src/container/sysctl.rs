//! Kernel settings of the container's namespaces, or of the virtual machine where they have no namespace.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A setting could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The name is none.
    #[error("linux.sysctl: {0:?} is not the name of a setting")]
    Name(String),
    /// The kernel refused it.
    #[error("linux.sysctl: cannot set {name} to {value:?}: {source}")]
    Write {
        /// The setting.
        name: String,
        /// The value.
        value: String,
        /// Why not.
        source: std::io::Error,
    },
}

/// Whether a setting is one of a network namespace.
fn is_of_network(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
}

/// Makes the network's settings for a container that shares the sandbox's network and has no power over it, being in a
/// user namespace. Its root may use low ports all the same, as it may in a network of its own.
pub fn write_for_network(settings: Option<&HashMap<String, String>>) -> Result<(), SysctlError> {
    let low_ports = ("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
    let of_network = settings.into_iter().flatten().filter(|(name, _)| is_of_network(name));
    let all: HashMap<_, _> = [low_ports]
        .into_iter()
        .chain(of_network.map(|(name, value)| (name.clone(), value.clone())))
        .collect();
    write(&all)
}

/// Makes the other settings of such a container.
pub fn write_but_for_network(settings: &HashMap<String, String>) -> Result<(), SysctlError> {
    let others = settings.iter().filter(|(name, _)| !is_of_network(name));
    write(&others.map(|(name, value)| (name.clone(), value.clone())).collect())
}

/// Writes the settings, through the guest's own `/proc`: what is written depends on who writes, not on whose
/// `/proc` it is, and the container's own could be anything.
pub fn write(settings: &HashMap<String, String>) -> Result<(), SysctlError> {
    for (name, value) in settings {
        let path = path(name).ok_or_else(|| SysctlError::Name(name.clone()))?;
        std::fs::write(path, value).map_err(|source| SysctlError::Write {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(())
}

/// `net.ipv4.ip_forward` and `net/ipv4/ip_forward` are the same. With slashes, dots belong to the names, as in
/// `net/ipv4/conf/eth0.1/forwarding`.
fn path(name: &str) -> Option<PathBuf> {
    let separator = if name.contains('/') { '/' } else { '.' };
    let parts: Vec<&str> = name.split(separator).collect();
    let plain = |part: &&str| !matches!(*part, "" | "." | "..") && !part.contains('\0');
    if parts.len() < 2 || !parts.iter().all(plain) {
        return None;
    }
    Some(Path::new("/proc/sys").join(parts.iter().collect::<PathBuf>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_write_a_name_are_read() {
        assert_eq!(path("net.ipv4.ip_forward"), Some("/proc/sys/net/ipv4/ip_forward".into()));
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding"),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding".into())
        );
    }

    #[test]
    fn no_name_leads_out_of_the_settings() {
        for bad in ["", "net", "a..b", "../kcore", "net/../../x", "/etc/passwd", "net./x/..", "a/./b"] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }
}
