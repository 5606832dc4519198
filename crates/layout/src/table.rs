//! Coordinator side: what has been lent. See docs/architecture.md, "Layout rules".
//!
//! Two kinds of request want a range of a file: a **get** (a client wants a grant) and a **guard** (the
//! coordinator wants to act on the range itself). Both wait in order of arrival until nothing conflicts; the table
//! emits recalls for what is in the way. A get that got through is `Mapping` (the driver allocates and maps;
//! guards and conflicting gets wait), then granted; a guard that got through is `Held` until released.

use crate::Access;
use csv_types::{ByteRange, FileId, NodeId};

/// Milliseconds of a monotonic clock.
pub type Tick = u64;

/// Number that the driver gives a get or a guard; unique while it is pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A client asks for a grant.
    Get { request: RequestId, node: NodeId, file: FileId, range: ByteRange, access: Access },
    /// The driver mapped the range of a get that was told to `Map`; `range` is what can be granted (inside or
    /// around the asked one, but see `Effect::Map::limit`).
    Mapped { request: RequestId, range: ByteRange },
    /// The driver could not map; the get is over without a grant.
    MapFailed { request: RequestId },
    /// The coordinator wants to act on a range. `except` names a node whose grants may stay (its own I/O order
    /// is its own business), `keep_read` lets read grants stay.
    Guard { request: RequestId, file: FileId, range: ByteRange, except: Option<NodeId>, keep_read: bool },
    /// The guarded action is over (or is given up: allowed in every state of the guard).
    Release { request: RequestId },
    /// A get is given up by its caller before it was granted.
    CancelGet { request: RequestId },
    /// A client returned a range: grants with `seq <= up_to_seq` are gone there.
    Returned { node: NodeId, file: FileId, range: ByteRange, up_to_seq: u64 },
    /// After a coordinator restart: a client holds this. Refused (by `Effect::ReclaimRefused`) on conflict.
    Reclaim { node: NodeId, file: FileId, range: ByteRange, access: Access, seq: u64 },
    /// The node can write the LUN no more (lease over, fenced, clean goodbye): everything it held is gone.
    NodeGone { node: NodeId },
    /// Time passed.
    Tick,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Allocate and map; nothing conflicts within `limit` (which contains the asked range) until answered.
    Map { request: RequestId, limit: ByteRange },
    /// Send the grant.
    Granted { request: RequestId, node: NodeId, file: FileId, range: ByteRange, access: Access, seq: u64 },
    /// The get ends without a grant (superseded by NodeGone or MapFailed).
    GetEnded { request: RequestId },
    /// Act now.
    Held { request: RequestId },
    /// Send a recall. Sent once per grant and cause; sent again by `Tick` every `resend_ms` until answered.
    Recall { node: NodeId, file: FileId, range: ByteRange, up_to_seq: u64, recall_id: u64, keep_read: bool },
    /// The node did not return in time: make sure it cannot write, then feed `NodeGone`.
    Fence { node: NodeId, file: FileId },
    /// A reclaim that contradicts what is lent already: the node must be told `Revoked`.
    ReclaimRefused { node: NodeId, file: FileId },
}
