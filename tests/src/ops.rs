//! What the driver asks of a node and what it gets back, as JSON lines.

use serde::{Deserialize, Serialize};

/// An operation. Names are relative to the agent's directory; slots are open files of one agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Op {
    /// Opens for reading and writing.
    Open {
        /// Where to keep it.
        slot: u32,
        /// File.
        name: String,
        /// Flags.
        how: How,
    },
    /// Closes.
    Close {
        /// Which.
        slot: u32,
    },
    /// pread.
    Read {
        /// Which.
        slot: u32,
        /// From.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Reads through a private read-only mapping of whole pages, all below the end of file.
    MapRead {
        /// Which.
        slot: u32,
        /// From.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// pwrite of [`crate::rng::pattern`]; appends when the slot is open with `append`.
    Write {
        /// Which.
        slot: u32,
        /// To.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Of the pattern.
        seed: u64,
    },
    /// ftruncate.
    SetLen {
        /// Which.
        slot: u32,
        /// New size.
        size: u64,
    },
    /// truncate by name.
    Truncate {
        /// File.
        name: String,
        /// New size.
        size: u64,
    },
    /// fallocate.
    Allocate {
        /// Which.
        slot: u32,
        /// Kind.
        kind: Allocate,
        /// From.
        offset: u64,
        /// Bytes, not 0.
        len: u64,
    },
    /// fsync.
    Sync {
        /// Which.
        slot: u32,
    },
    /// rename, replacing.
    Rename {
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// link.
    Link {
        /// Existing name.
        from: String,
        /// New name.
        to: String,
    },
    /// unlink.
    Unlink {
        /// Name.
        name: String,
    },
    /// stat by name.
    Stat {
        /// Name.
        name: String,
    },
    /// fstat.
    StatSlot {
        /// Which.
        slot: u32,
    },
    /// fsync of every file in the directory, and of the directory.
    SyncDir,
    /// Names in the directory, sorted.
    List,
    /// A lock, of the whole process or of the open file.
    Lock {
        /// Which.
        slot: u32,
        /// Kind.
        kind: LockKind,
        /// Shared, exclusive or none.
        mode: LockMode,
        /// First byte (not for flock).
        start: u64,
        /// Bytes, 0 = to the end (not for flock).
        len: u64,
        /// Wait for it.
        wait: bool,
    },
}

/// Open flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct How {
    /// O_CREAT.
    pub create: bool,
    /// O_EXCL.
    pub exclusive: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// O_APPEND.
    pub append: bool,
    /// O_DIRECT.
    pub direct: bool,
}

/// Kinds of fallocate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allocate {
    /// Mode 0: may grow the file.
    Extend,
    /// FALLOC_FL_KEEP_SIZE.
    KeepSize,
    /// FALLOC_FL_PUNCH_HOLE with KEEP_SIZE.
    Punch,
    /// FALLOC_FL_ZERO_RANGE: may grow the file.
    Zero,
}

/// Kinds of locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockKind {
    /// flock(2).
    Flock,
    /// fcntl(2) F_SETLK.
    Posix,
    /// fcntl(2) F_OFD_SETLK.
    Ofd,
}

/// What a lock allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockMode {
    /// Others may read.
    Shared,
    /// Others may not.
    Exclusive,
    /// Released.
    Unlock,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Done,
    /// Bytes read, in hex.
    Data {
        /// Two digits per byte.
        hex: String,
    },
    /// Bytes written.
    Count {
        /// Bytes.
        count: u64,
    },
    /// Attributes.
    Stat {
        /// st_size.
        size: u64,
        /// st_nlink.
        nlink: u64,
        /// st_ino.
        ino: u64,
        /// st_mtime in nanoseconds.
        mtime_ns: i64,
    },
    /// Names.
    Names {
        /// Sorted.
        names: Vec<String>,
    },
    /// The call failed.
    Failed {
        /// Linux errno.
        errno: i32,
    },
}

impl Reply {
    /// Bytes as an answer.
    #[must_use]
    pub fn data(bytes: &[u8]) -> Reply {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
        Reply::Data { hex: bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect() }
    }

    /// For messages: long data shortened.
    #[must_use]
    pub fn brief(&self) -> String {
        if let Reply::Data { hex } = self
            && hex.len() > 64
        {
            return format!("{} bytes {}...", hex.len() / 2, &hex[..64]);
        }
        format!("{self:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_hex_and_operations_round_trip() {
        assert_eq!(Reply::data(&[0, 0x1f, 0xff]), Reply::Data { hex: "001fff".into() });
        let op = Op::Allocate { slot: 1, kind: Allocate::KeepSize, offset: 2, len: 3 };
        let text = serde_json::to_string(&op).unwrap();
        assert_eq!(text, r#"{"op":"allocate","slot":1,"kind":"keep-size","offset":2,"len":3}"#);
        assert_eq!(serde_json::from_str::<Op>(&text).unwrap(), op);
    }
}
