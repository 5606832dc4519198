//! Words of the lock table: who asks, for what, and what comes out.

use csv_types::{FileId, NodeId};

/// Names one request from when it goes in until it is answered. Chosen by the caller, unique among the
/// requests that wait in one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Who a lock belongs to. Two owners are the same when their keys are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerKey {
    /// Session of the node that asks.
    pub session: u64,
    /// Lock owner as the kernel sends it to the FUSE file system.
    pub owner: u64,
}

/// An owner with what is reported about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Session of the node that asks.
    pub session: u64,
    /// Lock owner as the kernel sends it to the FUSE file system.
    pub owner: u64,
    /// Process on that node; for reports only.
    pub pid: u32,
    /// The node; for reports only.
    pub node: NodeId,
}

impl Owner {
    /// What tells owners apart.
    #[must_use]
    pub fn key(&self) -> OwnerKey {
        OwnerKey { session: self.session, owner: self.owner }
    }
}

/// Which of the two separate lock spaces of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Byte ranges: `fcntl` POSIX and OFD locks.
    Posix,
    /// `flock`: the whole file; the range of a request is not looked at.
    Flock,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockType {
    /// Shared.
    Read,
    /// Alone.
    Write,
    /// Give up.
    Unlock,
}

impl LockType {
    /// Can two owners not have these on one byte?
    #[must_use]
    pub fn conflicts(self, other: LockType) -> bool {
        self != LockType::Unlock
            && other != LockType::Unlock
            && (self == LockType::Write || other == LockType::Write)
    }
}

/// Bytes `start..=end`; an `end` of `u64::MAX` reaches to whatever the end of the file becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive.
    pub end: u64,
}

impl LockRange {
    /// Every byte.
    pub const ALL: LockRange = LockRange { start: 0, end: u64::MAX };

    /// `start..=end`; `None` when inverted.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start <= end).then_some(LockRange { start, end })
    }

    /// At least one common byte?
    #[must_use]
    pub fn overlaps(&self, other: &LockRange) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// A common byte, or no byte between them?
    #[must_use]
    pub fn touches(&self, other: &LockRange) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }
}

/// One request to set, convert or give up a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockRequest {
    /// The file.
    pub file: FileId,
    /// Who asks.
    pub owner: Owner,
    /// Which lock space.
    pub kind: Kind,
    /// Which bytes.
    pub range: LockRange,
    /// What for.
    pub lock_type: LockType,
    /// Wait for conflicting locks to go (`F_SETLKW`, `flock` without `LOCK_NB`).
    pub wait: bool,
}

/// A lock that is held, as reports and `F_GETLK` show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldLock {
    /// Holder.
    pub owner: Owner,
    /// Lock space.
    pub kind: Kind,
    /// Bytes.
    pub range: LockRange,
    /// `Read` or `Write`.
    pub lock_type: LockType,
}

/// Why a request was refused; nothing was locked. (A refused flock conversion has lost the old lock.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another owner holds a conflicting lock and the request does not wait: EAGAIN.
    #[error("another owner holds a conflicting lock; try again or ask to wait")]
    WouldBlock,
    /// Waiting would close a circle of owners that wait for each other: EDEADLK.
    #[error("waiting would be a deadlock; release a lock first")]
    Deadlock,
    /// A bound of the table is reached: ENOLCK.
    #[error("too many locks or waiters on this file or volume; release some first")]
    NoLocks,
    /// The range is inverted: EINVAL.
    #[error("the last byte of the range lies before its first; correct the range")]
    Invalid,
}

impl Refusal {
    /// The Linux errno an application sees.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Refusal::WouldBlock => 11,
            Refusal::Invalid => 22,
            Refusal::Deadlock => 35,
            Refusal::NoLocks => 37,
        }
    }
}

/// What goes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Set, convert or give up a lock.
    Set {
        /// Name of the request.
        req: RequestId,
        /// The request.
        request: LockRequest,
    },
    /// The same in the grace period after a change of coordinator: never waits.
    Reclaim {
        /// Name of the request.
        req: RequestId,
        /// The request; its `wait` is not looked at.
        request: LockRequest,
    },
    /// Stop waiting (a signal came); nothing happens when the request was answered before.
    Cancel {
        /// Name of the request.
        req: RequestId,
    },
    /// The owner closed the file: its locks there go, in both lock spaces.
    DropOwner {
        /// The file.
        file: FileId,
        /// The owner.
        owner: OwnerKey,
    },
    /// A session ended: everything it holds or waits for goes.
    DropSession {
        /// The session.
        session: u64,
    },
}

/// What comes out. Each request gets exactly one of `Granted`, `Refused` and `Interrupted`, at most once
/// preceded by `Queued`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Done; answer 0.
    Granted {
        /// Which request.
        req: RequestId,
    },
    /// Not done; answer the errno.
    Refused {
        /// Which request.
        req: RequestId,
        /// Why.
        refusal: Refusal,
    },
    /// Waits; a later effect answers it.
    Queued {
        /// Which request.
        req: RequestId,
    },
    /// Waits no longer, nothing was locked; answer EINTR.
    Interrupted {
        /// Which request.
        req: RequestId,
    },
}
