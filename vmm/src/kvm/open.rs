//! Opening `/dev/kvm`, with an error that helps.

use std::io::ErrorKind;

use kvm_ioctls::{Cap, Kvm};

/// The stable version of KVM's interface.
const API_VERSION: i32 = 12;

/// KVM cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{finding}")]
pub struct KvmUnusable {
    /// What was found.
    pub finding: String,
    /// What the user can do.
    pub remedy: String,
}

impl KvmUnusable {
    fn new(finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { finding: finding.into(), remedy: remedy.into() }
    }
}

/// What a virtual machine of ours needs of KVM.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens KVM and checks that it has what is needed.
pub fn open() -> Result<Kvm, KvmUnusable> {
    let kvm = Kvm::new().map_err(|error| explain(std::io::Error::from_raw_os_error(error.errno())))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let finding = format!("/dev/kvm speaks version {version} of its interface, not {API_VERSION}");
        return Err(KvmUnusable::new(finding, "use a current Linux kernel"));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(KvmUnusable::new(format!("/dev/kvm lacks {name}"), "use Linux 5.10 or later"));
        }
    }
    Ok(kvm)
}

fn explain(error: std::io::Error) -> KvmUnusable {
    match error.kind() {
        ErrorKind::NotFound => KvmUnusable::new(
            "there is no /dev/kvm",
            "load the module kvm_intel or kvm_amd; in a virtual machine, have its host enable nested virtualization",
        ),
        ErrorKind::PermissionDenied => KvmUnusable::new(
            "no permission to open /dev/kvm",
            "run as root, or add the user to the group kvm: usermod -aG kvm USER, then log in again",
        ),
        _ => match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => KvmUnusable::new(
                "/dev/kvm is there but no KVM module answers",
                "load the module kvm_intel or kvm_amd, or enable virtualization in the firmware",
            ),
            _ => KvmUnusable::new(format!("cannot open /dev/kvm: {error}"), "see the kernel log"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_own_remedy() {
        let told = |errno| {
            let unusable = explain(std::io::Error::from_raw_os_error(errno));
            (unusable.finding, unusable.remedy)
        };
        let all: std::collections::BTreeSet<_> =
            [libc::ENOENT, libc::EACCES, libc::ENODEV, libc::EIO].map(told).into_iter().collect();
        assert_eq!(all.len(), 4);
        assert!(told(libc::EPERM).1.contains("usermod"));
    }
}
