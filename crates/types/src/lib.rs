//! Words that every crate of csvfs uses: identifiers, ranges, modes, the node's configuration file and the
//! local admin protocol.
//!
//! Pure: no I/O, no clock, no randomness. Invariants are kept by constructors; nothing here can fail at run
//! time except parsing.

pub mod admin;
pub mod config;
pub mod ids;
pub mod mode;
pub mod range;

pub use ids::{Epoch, FileId, LunOffset, NodeId, VolumeId};
pub use mode::{Mode, ModeKind, Reason};
pub use range::ByteRange;

/// Block size in bytes of every volume's file system; the largest that every machine can mount. Blocks are shared
/// between nodes as wholes: what is less than one is written under an exclusive layout, by reading it first, also where
/// the LUN takes smaller writes. Linux turns a direct write to a block device into one through the device's page cache
/// where a page of that cache cannot be thrown away (the coordinator's ext4 holds some), and writes whole blocks of
/// it; what such a page holds beside the written bytes may be older than what another node has written.
pub const FS_BLOCK_BYTES: u64 = 4096;
