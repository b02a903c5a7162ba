//! Finding the guest kernel, the guest image and `sandbox-vmm`.
//!
//! In this order: an environment variable, the operator's configuration, the installed places, beside the running
//! binary, the build tree that the binary was compiled in.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::config::Machine;

/// Something that a run needs from the installation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Artefact {
    /// The guest kernel.
    Kernel,
    /// The guest image.
    Image,
    /// The program that runs the machine.
    Vmm,
}

/// Why an artefact cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArtefactError {
    /// It is nowhere.
    #[error(
        "the {what} is in none of its places ({places}): build it with `make`, install it with `make install`, or name it with {variable} or `{key}` of the configuration"
    )]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        places: String,
        /// The variable that names it.
        variable: &'static str,
        /// The key of the configuration that does.
        key: &'static str,
    },
    /// Somebody names something that is not there.
    #[error("the {what} {}, named by {by}, cannot be read: {error}", path.display())]
    Unreadable {
        /// What it is.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The variable or the key.
        by: &'static str,
        /// Why.
        error: io::Error,
    },
    /// It is something else.
    #[error("{} is not a {what}: {why}", path.display())]
    Wrong {
        /// What it should be.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What it is instead.
        why: &'static str,
    },
}

impl Artefact {
    fn what(self) -> &'static str {
        match self {
            Self::Kernel => "guest kernel",
            Self::Image => "guest image",
            Self::Vmm => "program sandbox-vmm",
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            Self::Kernel => "vmlinux",
            Self::Image => "guest.img",
            Self::Vmm => "sandbox-vmm",
        }
    }

    /// The environment variable that names it.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Kernel => "SANDBOX_KERNEL",
            Self::Image => "SANDBOX_IMAGE",
            Self::Vmm => "SANDBOX_VMM",
        }
    }

    /// The key of the configuration that names it.
    fn key(self) -> &'static str {
        match self {
            Self::Kernel => "machine.kernel",
            Self::Image => "machine.image",
            Self::Vmm => "machine.vmm",
        }
    }

    /// Finds it and looks whether it is what it should be.
    pub fn find(self, config: &Machine) -> Result<PathBuf, ArtefactError> {
        let variable = std::env::var_os(self.variable()).map(|path| (PathBuf::from(path), self.variable()));
        let configured = match self {
            Self::Kernel => &config.kernel,
            Self::Image => &config.image,
            Self::Vmm => &config.vmm,
        };
        let named = variable.or_else(|| Some((configured.clone()?, self.key())));
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
        self.find_in(named, &self.places(beside.as_deref()))
    }

    /// The places it may be in, first the one that is taken first.
    fn places(self, beside: Option<&Path>) -> Vec<PathBuf> {
        let installed = match self {
            Self::Kernel | Self::Image => vec![PathBuf::from("/usr/lib/sandbox")],
            // The two programs speak a private protocol: the one of the same build comes first.
            Self::Vmm => vec![],
        };
        let prefix = |below: &str| beside.and_then(Path::parent).map(|p| p.join(below));
        let mut directories = installed;
        directories.extend(beside.map(Path::to_path_buf));
        directories.extend(prefix("lib/sandbox"));
        directories.extend(prefix("libexec"));
        if self == Self::Vmm {
            directories.extend(["/usr/lib/sandbox", "/usr/libexec", "/usr/bin"].map(PathBuf::from));
        }
        directories.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../build"));
        directories.into_iter().map(|directory| directory.join(self.file_name())).collect()
    }

    fn find_in(
        self,
        named: Option<(PathBuf, &'static str)>,
        places: &[PathBuf],
    ) -> Result<PathBuf, ArtefactError> {
        let what = self.what();
        if let Some((path, by)) = named {
            return match self.check(&path) {
                Err(CheckError::Io(error)) => Err(ArtefactError::Unreadable { what, path, by, error }),
                Err(CheckError::Wrong(why)) => Err(ArtefactError::Wrong { what, path, why }),
                Ok(()) => Ok(absolute(path)),
            };
        }
        for place in places {
            match self.check(place) {
                Ok(()) => return Ok(absolute(place.clone())),
                Err(CheckError::Wrong(why)) => {
                    return Err(ArtefactError::Wrong { what, path: place.clone(), why });
                }
                Err(CheckError::Io(_)) => {}
            }
        }
        let places =
            places.iter().map(|p| absolute(p.clone()).display().to_string()).collect::<Vec<_>>().join(", ");
        let (variable, key) = (self.variable(), self.key());
        Err(ArtefactError::Missing { what, places, variable, key })
    }

    fn check(self, path: &Path) -> Result<(), CheckError> {
        let mut head = Vec::new();
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(CheckError::Wrong("it is no regular file"));
        }
        file.take(HEAD_BYTES).read_to_end(&mut head)?;
        let why = match self {
            Self::Kernel => kernel_fault(&head),
            Self::Image => image_fault(&head),
            Self::Vmm if metadata.permissions().mode() & 0o111 == 0 => Some("it is not executable"),
            Self::Vmm => None,
        };
        why.map_or(Ok(()), |why| Err(CheckError::Wrong(why)))
    }
}

/// How much of a file shows what it is: a bzImage has its mark at 0x202.
const HEAD_BYTES: u64 = 0x206;

enum CheckError {
    Io(io::Error),
    Wrong(&'static str),
}

impl From<io::Error> for CheckError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What is wrong with a kernel, by its first bytes. The machine's loader looks at the rest.
fn kernel_fault(head: &[u8]) -> Option<&'static str> {
    const ELF64_LITTLE_ENDIAN: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
    const EM_X86_64: [u8; 2] = 62u16.to_le_bytes();
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return Some("it is a compressed bzImage; the uncompressed `vmlinux` is needed");
    }
    if !head.starts_with(&ELF64_LITTLE_ENDIAN) {
        return Some("it is no 64-bit ELF file; the uncompressed `vmlinux` is needed");
    }
    (head.get(18..20) != Some(&EM_X86_64)).then_some("it is for another processor; one for x86-64 is needed")
}

fn image_fault(head: &[u8]) -> Option<&'static str> {
    let cpio = head.starts_with(b"070701") || head.starts_with(b"070702");
    (!cpio).then_some("it is no uncompressed cpio archive (`newc`)")
}

fn absolute(path: PathBuf) -> PathBuf {
    path.canonicalize().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn elf(machine: u16) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        head[18..20].copy_from_slice(&machine.to_le_bytes());
        head
    }

    #[test]
    fn the_first_place_wins_and_the_environment_beats_them_all() {
        let dir = tempfile::tempdir().unwrap();
        let places: Vec<_> = ["a", "b", "c"].map(|n| dir.path().join(n)).into();
        fs::write(&places[1], elf(62)).unwrap();
        fs::write(&places[2], elf(62)).unwrap();
        assert_eq!(Artefact::Kernel.find_in(None, &places).unwrap(), absolute(places[1].clone()));
        let named = Artefact::Kernel.find_in(Some((places[2].clone(), "SANDBOX_KERNEL")), &places).unwrap();
        assert_eq!(named, absolute(places[2].clone()));
    }

    #[test]
    fn missing_artefacts_say_where_they_were_looked_for() {
        let places = [PathBuf::from("/nowhere/vmlinux"), PathBuf::from("/neither/vmlinux")];
        let message = Artefact::Kernel.find_in(None, &places).unwrap_err().to_string();
        assert!(message.contains("/nowhere/vmlinux, /neither/vmlinux"), "{message}");
        assert!(message.contains("SANDBOX_KERNEL"), "{message}");
        let named =
            Artefact::Image.find_in(Some(("/nowhere/image".into(), "machine.image")), &places).unwrap_err();
        assert!(matches!(named, ArtefactError::Unreadable { .. }));
    }

    #[test]
    fn what_is_no_kernel_is_named_for_what_it_is() {
        let mut bzimage = vec![0; 0x206];
        bzimage[0x202..].copy_from_slice(b"HdrS");
        assert!(kernel_fault(&bzimage).unwrap().contains("bzImage"));
        assert!(kernel_fault(b"#!/bin/sh\n").unwrap().contains("no 64-bit ELF"));
        assert!(kernel_fault(b"").unwrap().contains("no 64-bit ELF"));
        assert!(kernel_fault(&elf(183)).unwrap().contains("another processor"));
        assert_eq!(kernel_fault(&elf(62)), None);
        assert!(image_fault(b"\x1f\x8b").is_some());
        assert_eq!(image_fault(b"070701"), None);
    }
}
