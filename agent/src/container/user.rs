//! Whose rights a process has: numbers from the configuration, or names looked up in the container's own files.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use oci_spec::runtime::User as OciUser;

/// The most bytes read of `/etc/passwd` and `/etc/group`, which belong to the hostile side.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// The most groups that a process can have, the kernel's limit.
const MAX_GROUPS: usize = 65_536;

/// A user or group that the container does not have.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum UserError {
    /// No such user.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    /// No such group.
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
}

/// The user of a process.
#[derive(Clone, Debug, PartialEq)]
pub struct User {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
    /// Additional groups.
    pub groups: Vec<u32>,
}

impl User {
    /// The user with the configured numbers, which need not be in any file.
    pub fn by_number(user: &OciUser) -> Self {
        Self { uid: user.uid(), gid: user.gid(), groups: user.additional_gids().clone().unwrap_or_default() }
    }
}

/// The container's own lists of users and groups, as text. Missing files are empty.
#[derive(Debug, Default)]
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads the files in the root of this process, which must be the container's.
    pub fn read() -> Self {
        Self { passwd: read_regular("/etc/passwd"), group: read_regular("/etc/group") }
    }

    /// The user that `name|uid[:group|gid]` stands for, with the groups that list it where no group is given.
    ///
    /// A number need not be in the files; its group is then 0.
    pub fn by_name(&self, wanted: &str) -> Result<User, UserError> {
        let (user, group) = match wanted.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (wanted, None),
        };
        let number: Option<u32> = user.parse().ok();
        let entry =
            self.users().find(|u| u.name == user).or_else(|| self.users().find(|u| Some(u.uid) == number));
        let (uid, own_gid, name) = match (entry, number) {
            (Some(entry), _) => (entry.uid, entry.gid, Some(entry.name)),
            (None, Some(uid)) => (uid, 0, None),
            (None, None) if user.is_empty() => (0, 0, None),
            (None, None) => return Err(UserError::NoUser(user.to_owned())),
        };
        let gid = group.map_or(Ok(own_gid), |group| self.gid(group))?;
        let groups = match (group, name) {
            (None, Some(name)) => self.groups_of(name),
            _ => Vec::new(),
        };
        Ok(User { uid, gid, groups })
    }

    fn gid(&self, wanted: &str) -> Result<u32, UserError> {
        self.groups()
            .find(|group| group.name == wanted)
            .map(|group| group.gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))
    }

    fn groups_of(&self, name: &str) -> Vec<u32> {
        self.groups()
            .filter(|group| group.members.split(',').any(|member| member == name))
            .map(|group| group.gid)
            .take(MAX_GROUPS)
            .collect()
    }

    /// The home directory of a user, for `HOME`.
    pub fn home(&self, uid: u32) -> String {
        let home = self.users().find(|user| user.uid == uid).map(|user| user.home);
        home.filter(|home| !home.is_empty()).unwrap_or("/").to_owned()
    }

    fn users(&self) -> impl Iterator<Item = PasswdEntry<'_>> {
        self.passwd.lines().filter_map(PasswdEntry::parse)
    }

    fn groups(&self) -> impl Iterator<Item = GroupEntry<'_>> {
        self.group.lines().filter_map(GroupEntry::parse)
    }
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> PasswdEntry<'a> {
    /// `name:password:uid:gid:comment:home:shell`; lines of another form are passed over.
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> GroupEntry<'a> {
    /// `name:password:gid:members`; lines of another form are passed over.
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Self { name, gid, members: fields.next().unwrap_or_default() })
    }
}

/// The beginning of a regular file as text, or nothing. A pipe in its place must not hold the process up.
fn read_regular(path: &str) -> String {
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let mut bytes = Vec::new();
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
    {
        // What was read before an error is used: a short list finds fewer users, never wrong ones.
        let _ = file.take(MAX_FILE_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:44:Web,,,:/srv/web:/bin/false\n33:x:1000:1000::/h:\n"
                .into(),
            group: "root:x:0:\nweb:x:44:\nadm:x:4:syslog,web\nvideo:x:27:web\n:::\n".into(),
        }
    }

    fn user(wanted: &str) -> Result<(u32, u32, Vec<u32>, String), UserError> {
        accounts().by_name(wanted).map(|user| (user.uid, user.gid, user.groups, accounts().home(user.uid)))
    }

    #[test]
    fn a_name_brings_its_groups_and_its_home() {
        assert_eq!(user("web"), Ok((33, 44, vec![4, 27], "/srv/web".into())));
        assert_eq!(user("web:video"), Ok((33, 27, vec![], "/srv/web".into())));
        assert_eq!(user("root:1234"), Ok((0, 1234, vec![], "/root".into())));
    }

    #[test]
    fn a_name_that_looks_like_a_number_comes_before_the_number() {
        assert_eq!(user("33"), Ok((1000, 1000, vec![], "/h".into())));
        assert_eq!(user("1000"), Ok((1000, 1000, vec![], "/h".into())));
    }

    #[test]
    fn a_number_needs_no_entry_and_a_name_does() {
        assert_eq!(user("4000"), Ok((4000, 0, vec![], "/".into())));
        assert_eq!(user("nobody"), Err(UserError::NoUser("nobody".into())));
        assert_eq!(user("web:none"), Err(UserError::NoGroup("none".into())));
        assert_eq!(user("-1"), Err(UserError::NoUser("-1".into())));
    }
}
