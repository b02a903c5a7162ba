//! The options of a mount, as fstab writes them, sorted into what the kernel takes in four different ways:
//! attributes of the mount, its propagation, flags of the file system, and data for the file system.

use libc::{
    MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_RELATIME,
    MOUNT_ATTR_STRICTATIME,
};

/// An option that cannot be honoured.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("the option {0:?} is not supported: remove it")]
pub struct UnsupportedOption(String);

/// Attributes to set on a mount and to clear from it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Attributes {
    /// Set.
    pub set: u64,
    /// Cleared.
    pub clear: u64,
}

impl Attributes {
    fn set(&mut self, bit: u64) {
        self.set |= bit;
        self.clear &= !bit;
    }

    fn clear(&mut self, bit: u64) {
        self.clear |= bit;
        self.set &= !bit;
    }

    /// The kinds of access time exclude each other: one replaces whatever there was.
    fn access_time(&mut self, kind: u64) {
        self.set = self.set & !MOUNT_ATTR__ATIME | kind;
        self.clear |= MOUNT_ATTR__ATIME;
    }

    /// Whether there is nothing to change.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// Which mount of others follow this one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Propagation {
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`.
    pub kind: u64,
    /// Whether it holds for the mounts below too.
    pub recursive: bool,
}

/// Whether the mount shows a directory or file that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Bind {
    /// No: it is a file system.
    #[default]
    No,
    /// Without the mounts below.
    Single,
    /// With them.
    Recursive,
}

/// The options of a mount.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MountOptions {
    /// Whether it is a bind mount.
    pub bind: Bind,
    /// Whether it changes a mount that is there.
    pub remount: bool,
    /// Whether a tmpfs begins with what is in the directory that it hides.
    pub copy_up: bool,
    /// Attributes of the mount itself.
    pub attributes: Attributes,
    /// Attributes of the mount and of those below it.
    pub recursive: Attributes,
    /// Propagations, in order.
    pub propagation: Vec<Propagation>,
    /// Flags and data for the file system, in order.
    pub data: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Sorts a list of options.
    pub fn parse(options: &[String]) -> Result<Self, UnsupportedOption> {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    /// The value of a datum for the file system.
    pub fn datum(&self, key: &str) -> Option<&str> {
        self.data.iter().rev().find(|(k, _)| k == key).and_then(|(_, value)| value.as_deref())
    }

    fn add(&mut self, option: &str) -> Result<(), UnsupportedOption> {
        match option {
            "bind" if self.bind == Bind::No => self.bind = Bind::Single,
            "bind" => {}
            "rbind" => self.bind = Bind::Recursive,
            "remount" => self.remount = true,
            "defaults" | "silent" | "loud" | "mand" | "nomand" | "" => {}
            "tmpcopyup" => self.copy_up = true,
            "notmpcopyup" => self.copy_up = false,
            "idmap" | "ridmap" => return Err(UnsupportedOption(option.to_owned())),
            _ if self.add_propagation(option) || self.add_attribute(option) => {}
            _ => self.add_data(option),
        }
        Ok(())
    }

    fn add_propagation(&mut self, option: &str) -> bool {
        let found = propagation(option);
        self.propagation.extend(found);
        found.is_some()
    }

    /// An attribute may have an `r` in front that makes it recursive; some names begin with one themselves.
    fn add_attribute(&mut self, option: &str) -> bool {
        if apply_attribute(&mut self.attributes, option) {
            return true;
        }
        option.strip_prefix('r').is_some_and(|plain| apply_attribute(&mut self.recursive, plain))
    }

    fn add_data(&mut self, option: &str) {
        self.data.push(match option.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (option.to_owned(), None),
        });
    }
}

/// The propagation that a name stands for.
pub fn propagation(name: &str) -> Option<Propagation> {
    let plain = |name| match name {
        "private" => Some(libc::MS_PRIVATE),
        "slave" => Some(libc::MS_SLAVE),
        "shared" => Some(libc::MS_SHARED),
        "unbindable" => Some(libc::MS_UNBINDABLE),
        _ => None,
    };
    if let Some(kind) = plain(name) {
        return Some(Propagation { kind, recursive: false });
    }
    name.strip_prefix('r').and_then(plain).map(|kind| Propagation { kind, recursive: true })
}

fn apply_attribute(attributes: &mut Attributes, name: &str) -> bool {
    match name {
        "ro" => attributes.set(MOUNT_ATTR_RDONLY),
        "rw" => attributes.clear(MOUNT_ATTR_RDONLY),
        "nosuid" => attributes.set(MOUNT_ATTR_NOSUID),
        "suid" => attributes.clear(MOUNT_ATTR_NOSUID),
        "nodev" => attributes.set(MOUNT_ATTR_NODEV),
        "dev" => attributes.clear(MOUNT_ATTR_NODEV),
        "noexec" => attributes.set(MOUNT_ATTR_NOEXEC),
        "exec" => attributes.clear(MOUNT_ATTR_NOEXEC),
        "nodiratime" => attributes.set(MOUNT_ATTR_NODIRATIME),
        "diratime" => attributes.clear(MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => attributes.set(MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => attributes.clear(MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => attributes.access_time(MOUNT_ATTR_NOATIME),
        "strictatime" => attributes.access_time(MOUNT_ATTR_STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => attributes.access_time(MOUNT_ATTR_RELATIME),
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> MountOptions {
        let list: Vec<String> = options.split(' ').map(str::to_owned).collect();
        MountOptions::parse(&list).unwrap()
    }

    #[test]
    fn a_tmpfs_has_attributes_and_data() {
        let options = parse("nosuid strictatime mode=755 size=64k");
        assert_eq!(options.attributes.set, MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.attributes.clear, MOUNT_ATTR__ATIME);
        assert_eq!(options.datum("mode"), Some("755"));
        assert_eq!(options.datum("size"), Some("64k"));
    }

    #[test]
    fn the_last_of_two_that_exclude_each_other_counts() {
        assert_eq!(parse("ro rw").attributes, Attributes { set: 0, clear: MOUNT_ATTR_RDONLY });
        assert_eq!(parse("rw ro").attributes, Attributes { set: MOUNT_ATTR_RDONLY, clear: 0 });
        assert_eq!(parse("noatime relatime").attributes.set, MOUNT_ATTR_RELATIME);
        assert_eq!(parse("size=1 size=2").datum("size"), Some("2"));
    }

    #[test]
    fn an_r_in_front_makes_it_recursive_unless_it_belongs_to_the_name() {
        let options = parse("rbind rro rnosuid");
        assert_eq!(options.bind, Bind::Recursive);
        assert_eq!(options.recursive.set, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID);
        assert!(options.attributes.is_empty());
        let options = parse("relatime ro rw rrelatime");
        assert_eq!(options.recursive.clear, MOUNT_ATTR__ATIME);
        assert!(options.data.is_empty());
    }

    #[test]
    fn propagation_is_kept_in_order() {
        let wanted = [
            Propagation { kind: libc::MS_PRIVATE, recursive: true },
            Propagation { kind: libc::MS_SHARED, recursive: false },
        ];
        assert_eq!(parse("rprivate shared").propagation, wanted);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_and_the_rest_is_for_the_file_system() {
        assert!(MountOptions::parse(&["idmap".into()]).is_err());
        let options = parse("sync dirsync newinstance gid=5");
        let flags: Vec<&str> = options.data.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(flags, ["sync", "dirsync", "newinstance", "gid"]);
    }
}
