//! What can go wrong with a LUN, in the kinds between which a caller has to choose.

use rustix::io::Errno;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// What was being done when an error came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoOp {
    /// Opening the LUN or asking for its geometry.
    Open,
    /// Asking whether the path works, without an I/O.
    Check,
    /// Reading blocks.
    Read,
    /// Writing blocks.
    Write,
    /// Flushing the device's write cache.
    Flush,
}

impl fmt::Display for IoOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoOp::Open => "open",
            IoOp::Check => "path check",
            IoOp::Read => "read",
            IoOp::Write => "write",
            IoOp::Flush => "flush",
        })
    }
}

/// An operation on a LUN that did not succeed.
///
/// After `PathFailed`, `Fenced` or `Shrunk` from a write the blocks hold old data, new data or a mixture; after
/// any other kind nothing was sent to the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LunError {
    /// The device or the way to it failed. The I/O may be repeated by another path.
    #[error("{op} of LUN {path} at byte {offset} failed: {errno}; check the path to the LUN", path = path.display())]
    PathFailed {
        /// What was being done.
        op: IoOp,
        /// The LUN.
        path: Arc<Path>,
        /// Byte offset on the LUN; 0 for open, check and flush.
        offset: u64,
        /// The device's answer.
        errno: Errno,
    },
    /// A reservation of another node keeps this one out. No path error: stop all I/O on the LUN.
    #[error("{op} of LUN {path} met a reservation conflict: this node is fenced off; rejoin the cluster", path = path.display())]
    Fenced {
        /// What was being done.
        op: IoOp,
        /// The LUN.
        path: Arc<Path>,
    },
    /// Opened for reading only, or write-protected.
    #[error("LUN {path} cannot be written: it is read-only", path = path.display())]
    ReadOnly {
        /// The LUN.
        path: Arc<Path>,
    },
    /// The range does not lie on the LUN.
    #[error("{op} of {len} bytes at byte {offset} reaches past the end of the LUN ({capacity_bytes} bytes)")]
    OutOfBounds {
        /// What was being done.
        op: IoOp,
        /// Byte offset on the LUN.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the LUN.
        capacity_bytes: u64,
    },
    /// Not a whole number of blocks, or a buffer whose address direct I/O does not take.
    #[error("{op} with {what} {value}, which is not a multiple of {align_bytes} bytes")]
    Misaligned {
        /// What was being done.
        op: IoOp,
        /// Which number is wrong.
        what: &'static str,
        /// The number.
        value: u64,
        /// What it has to be a multiple of.
        align_bytes: u64,
    },
    /// The buffer is shorter than the I/O.
    #[error("{op} of {need_bytes} bytes with a buffer of {have_bytes} bytes")]
    BufferTooSmall {
        /// What was being done.
        op: IoOp,
        /// Bytes in the buffer.
        have_bytes: usize,
        /// Bytes asked for.
        need_bytes: usize,
    },
    /// The LUN is smaller than when it was opened.
    #[error(
        "LUN {path} shrank from {was_bytes} to {now_bytes} bytes; stop the volume and restore the size in the storage system",
        path = path.display()
    )]
    Shrunk {
        /// The LUN.
        path: Arc<Path>,
        /// Size when it was opened.
        was_bytes: u64,
        /// Size now.
        now_bytes: u64,
    },
    /// Neither a block device nor a regular file, or of a shape that cannot serve.
    #[error("{path} cannot be a LUN: {why}", path = path.display())]
    Unsuitable {
        /// The path.
        path: Arc<Path>,
        /// What is wrong with it.
        why: &'static str,
        /// Errno for callers that need one.
        errno: Errno,
    },
}

impl LunError {
    /// A positive Linux errno for replies and FUSE.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let errno = match self {
            LunError::PathFailed { errno, .. } | LunError::Unsuitable { errno, .. } => *errno,
            LunError::Fenced { .. } => Errno::BADE,
            LunError::ReadOnly { .. } => Errno::ROFS,
            LunError::OutOfBounds { .. } => Errno::NXIO,
            LunError::Misaligned { .. } | LunError::BufferTooSmall { .. } => Errno::INVAL,
            LunError::Shrunk { .. } => Errno::IO,
        };
        errno.raw_os_error()
    }

    /// Did a reservation conflict keep this node out?
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        matches!(self, LunError::Fenced { .. })
    }

    /// May the same I/O succeed by another path (block redirection)?
    #[must_use]
    pub fn is_path_failure(&self) -> bool {
        matches!(self, LunError::PathFailed { .. })
    }
}
