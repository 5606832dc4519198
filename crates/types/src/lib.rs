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
