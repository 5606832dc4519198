//! Files and kernel settings that follow a resource, as they are kept among the checkpoints: a head in a line of JSON, then the
//! bytes of the file or the setting.
//!
//! Invariant: [`FileHead::decode`] of what [`FileHead::encode`] made gives the same. A value that is not understood is nobody's
//! file; whoever restores says so. What the database shows to others is the head alone ([`FileHead::alone`]).

use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Before the name of a kernel setting in a resource's list.
const SETTING: &str = "sysctl:";

/// What a resource's list of checkpoints names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed<'a> {
    /// A file, by its absolute path without `..`.
    File(&'a Path),
    /// A kernel setting: `sysctl:NAME`, by its file under `/proc/sys`.
    Setting(PathBuf),
}

impl<'a> Followed<'a> {
    /// Nothing if it is neither. The first separator in a setting's name says, as in sysctl(8), whether `.` or `/` separates;
    /// the other one is then a `.` within a part, as in `net/ipv4/conf/eth0.100/forwarding`.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Followed<'a>> {
        let Some(name) = text.strip_prefix(SETTING) else {
            return is_plain_path(text).then(|| Followed::File(Path::new(text)));
        };
        let dots = name.find(['.', '/']).is_none_or(|at| name.as_bytes().get(at) == Some(&b'.'));
        let swap = |c: char| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        };
        let path: String = if dots { name.chars().map(swap).collect() } else { name.to_owned() };
        let plain = !path.contains('\0') && !path.split('/').any(|part| matches!(part, "" | "." | ".."));
        plain.then(|| Followed::Setting(Path::new("/proc/sys").join(path)))
    }
}

/// Absolute, without `..`.
pub(super) fn is_plain_path(path: &str) -> bool {
    path.starts_with('/') && !path.contains('\0') && !path.split('/').any(|part| part == "..")
}

/// What a kept file or setting is, but for its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// Which file or setting it is, as the list has it: the resource's list may have changed since.
    pub path: String,
    /// Who saved it.
    pub node: NodeId,
    /// As in `st_mode` of stat(2); 0 for a setting, as the owners are.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Length of the file, or of the setting's text.
    pub bytes: u64,
    /// When the file was last written when it was saved, by the clock of `node`, in ns since 1970; 0 for a setting.
    pub modified_unix_ns: i64,
}

impl FileHead {
    /// Under which name the database keeps a resource's file: `resource:NAME:N`, N being its place in the list.
    #[must_use]
    pub fn key(resource: &str, index: usize) -> String {
        format!("resource:{resource}:{index}")
    }

    #[must_use]
    pub fn encode(&self, bytes: &[u8]) -> Vec<u8> {
        let mut value = serde_json::to_vec(self).unwrap_or_default();
        value.push(b'\n');
        value.extend_from_slice(bytes);
        value
    }

    /// The head, and the bytes of the file; nothing if it is not a file's.
    #[must_use]
    pub fn decode(value: &[u8]) -> Option<(FileHead, &[u8])> {
        let end = value.iter().position(|byte| *byte == b'\n')?;
        Some((serde_json::from_slice(value.get(..end)?).ok()?, value.get(end + 1..)?))
    }

    /// Leaves the head of a value, without the bytes, which may be a secret; nothing of what is not understood.
    pub fn alone(value: &mut Vec<u8>) {
        let end = FileHead::decode(value).map_or(0, |(_, bytes)| value.len() - bytes.len());
        value.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_settings_are_told_apart() {
        let setting = |path: &str| Some(Followed::Setting(PathBuf::from(path)));
        assert_eq!(Followed::parse("/etc/a.conf"), Some(Followed::File(Path::new("/etc/a.conf"))));
        assert_eq!(Followed::parse("sysctl:net.core.somaxconn"), setting("/proc/sys/net/core/somaxconn"));
        assert_eq!(Followed::parse("sysctl:net/core/somaxconn"), setting("/proc/sys/net/core/somaxconn"));
        let forwarding = setting("/proc/sys/net/ipv4/conf/eth0.100/forwarding");
        assert_eq!(Followed::parse("sysctl:net.ipv4.conf.eth0/100.forwarding"), forwarding);
        assert_eq!(Followed::parse("sysctl:net/ipv4/conf/eth0.100/forwarding"), forwarding);
        let none = [
            "etc/a",
            "/etc/../a",
            "",
            "sysctl:",
            "sysctl:/net",
            "sysctl:.net",
            "sysctl:net..core",
            "sysctl:net/../../etc/passwd",
            "sysctl:net.//.//.etc",
            "sysctl:a\0b",
            "/a\0",
        ];
        none.into_iter().for_each(|text| assert_eq!(Followed::parse(text), None, "{text}"));
    }

    #[test]
    fn a_head_is_shown_without_what_it_heads() {
        let (path, node) = ("/etc/a".to_owned(), NodeId(2));
        let head = FileHead { path, node, mode: 0o100_600, uid: 1, gid: 2, bytes: 6, modified_unix_ns: 7 };
        let mut value = head.encode(b"se\ncrt");
        assert_eq!(FileHead::decode(&value), Some((head.clone(), &b"se\ncrt"[..])));
        FileHead::alone(&mut value);
        assert_eq!(FileHead::decode(&value), Some((head, &b""[..])));
        let mut other = b"a secret\nof another kind".to_vec();
        FileHead::alone(&mut other);
        assert!(other.is_empty() && FileHead::decode(&other).is_none());
    }
}
