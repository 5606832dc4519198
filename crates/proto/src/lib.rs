//! Control protocol between the csvfs of a node and the coordinator of a volume, and, in [`cluster`], the protocol
//! between the nodes' csvd: generated types, and checked conversions to the words of [`csv_types`].
//!
//! Everything that arrives is untrusted until it went through a conversion here: absent ids, names that no
//! file system takes and inverted ranges end as [`Malformed`].

pub mod cluster;

use csv_types::ByteRange;

#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
mod generated {
    tonic::include_proto!("csv.volume.v1");
}

pub use generated::*;

/// Version of the protocol that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest file name, in bytes (NAME_MAX of ext4 and XFS).
pub const NAME_BYTES_MAX: usize = 255;

/// Largest message in either direction, in bytes: 1 MiB of data and room for the rest.
pub const MESSAGE_BYTES_MAX: usize = (1 << 20) + (64 << 10);

/// Errno of a reply (Linux's EREMCHG) that means: the call was not carried out, because the volume moves to another node. It
/// is to be sent to the next coordinator as one that was never sent.
pub const MOVED: i32 = 78;

/// A message that does not fit the protocol; the text names the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed control message: {0}")]
pub struct Malformed(pub &'static str);

impl From<csv_types::FileId> for generated::FileId {
    fn from(file: csv_types::FileId) -> Self {
        generated::FileId { ino: file.ino, generation: file.generation }
    }
}

/// A file id as it came over the wire.
///
/// # Errors
/// [`Malformed`] when it is absent or names inode 0.
pub fn file_id(wire: Option<generated::FileId>) -> Result<csv_types::FileId, Malformed> {
    match wire {
        Some(file) if file.ino != 0 => Ok(csv_types::FileId { ino: file.ino, generation: file.generation }),
        Some(_) | None => Err(Malformed("file id")),
    }
}

/// A single path component as it came over the wire.
///
/// # Errors
/// ENAMETOOLONG has its own errno and is left to the file system: only names that are not a component at all
/// (empty, with a slash or a NUL, `.` or `..`) are malformed.
pub fn component(name: &[u8]) -> Result<&[u8], Malformed> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Malformed("name"));
    }
    Ok(name)
}

/// A byte range as it came over the wire.
///
/// # Errors
/// [`Malformed`] when the end lies before the start.
pub fn byte_range(start: u64, end: u64) -> Result<ByteRange, Malformed> {
    if end < start {
        return Err(Malformed("range"));
    }
    Ok(ByteRange { start, end })
}

impl generated::LayoutGrant {
    /// The granted range.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        ByteRange::new(self.offset, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_component_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            assert!(component(bad).is_err(), "{bad:?}");
        }
        assert!(component(b"\xff\xfe").is_ok());
    }

    #[test]
    fn absent_ids_are_refused() {
        assert!(file_id(None).is_err());
        assert!(file_id(Some(generated::FileId { ino: 0, generation: 1 })).is_err());
    }
}
