//! Files that follow a resource, as they are kept among the checkpoints: a head in a line of JSON, then the file's bytes.
//!
//! Invariant: [`FileHead::decode`] of what [`FileHead::encode`] made gives the same. A value that is not understood is nobody's
//! file; whoever restores says so. What the database shows to others is the head alone ([`FileHead::alone`]).

use csv_types::NodeId;
use serde::{Deserialize, Serialize};

/// What a kept file is, but for its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// Which file it is: the resource's list may have changed since.
    pub path: String,
    /// Who saved it.
    pub node: NodeId,
    /// As in `st_mode` of stat(2).
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Length of the file.
    pub bytes: u64,
    /// When the file was last written when it was saved, by the clock of `node`, in ns since 1970.
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
