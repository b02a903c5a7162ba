//! The five capability sets of a process.

use std::str::FromStr;

use oci_spec::runtime::{Capabilities, LinuxCapabilities};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities,
};

/// A capability set was refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the {set} capabilities: {source}")]
pub struct CapabilityError {
    set: &'static str,
    source: Errno,
}

fn refused(set: &'static str) -> impl Fn(Errno) -> CapabilityError {
    move |source| CapabilityError { set, source }
}

/// The five sets, as bits. Without a configuration they are empty.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Sets {
    /// Reads the configuration.
    pub fn of(configured: Option<&LinuxCapabilities>) -> Self {
        let Some(configured) = configured else { return Self::default() };
        Self {
            bounding: bits(configured.bounding()),
            effective: bits(configured.effective()),
            permitted: bits(configured.permitted()),
            inheritable: bits(configured.inheritable()),
            ambient: bits(configured.ambient()),
        }
    }

    /// Narrows the bounding set and keeps the permitted one over the change of user that follows.
    pub fn before_user(self) -> Result<(), CapabilityError> {
        for number in 0..u64::BITS {
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
                Ok(()) => {}
                // Past the last capability that the kernel knows.
                Err(Errno::INVAL) => break,
                Err(e) => return Err(refused("bounding")(e)),
            }
        }
        set_keep_capabilities(true).map_err(refused("permitted"))
    }

    /// Sets the other four.
    pub fn after_user(self) -> Result<(), CapabilityError> {
        set_keep_capabilities(false).map_err(refused("permitted"))?;
        let sets = CapabilitySets {
            effective: CapabilitySet::from_bits_retain(self.effective),
            permitted: CapabilitySet::from_bits_retain(self.permitted),
            inheritable: CapabilitySet::from_bits_retain(self.inheritable),
        };
        set_capabilities(None, sets).map_err(refused("effective, permitted and inheritable"))?;
        clear_ambient_capability_set().map_err(refused("ambient"))?;
        for number in (0..u64::BITS).filter(|number| self.ambient & (1 << number) != 0) {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            match configure_capability_in_ambient_set(capability, true) {
                // One that the kernel does not know, or that is not inheritable as well. The specification wants
                // no failure for what cannot be granted, and buildah counts on it.
                Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
                Err(e) => return Err(refused("ambient")(e)),
            }
        }
        Ok(())
    }
}

fn bits(set: &Option<Capabilities>) -> u64 {
    set.iter()
        .flatten()
        .filter_map(|capability| caps::Capability::from_str(&format!("CAP_{capability}")).ok())
        .fold(0, |bits, capability| bits | capability.bitmask())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_bits_of_their_own_set() {
        let json =
            r#"{"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "ambient": ["CAP_NET_BIND_SERVICE"]}"#;
        let sets = Sets::of(Some(&serde_json::from_str(json).unwrap()));
        assert_eq!(sets.bounding, 1 | 1 << 40);
        assert_eq!(sets.ambient, 1 << 10);
        assert_eq!(sets.effective, 0);
        assert_eq!(Sets::of(None), Sets::default());
    }

    #[test]
    fn every_capability_of_the_specification_has_a_number() {
        let json =
            format!("[{}]", caps::all().iter().map(|c| format!("\"{c}\"")).collect::<Vec<_>>().join(","));
        let all: Capabilities = serde_json::from_str(&json).unwrap();
        assert_eq!(bits(&Some(all)).count_ones() as usize, caps::all().len());
    }
}
