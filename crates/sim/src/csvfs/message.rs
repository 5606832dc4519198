//! What csvfs processes of a volume say to each other, and what csvd orders.

use crate::world::lun::FileNo;
use csv_layout::cache::HeldGrant;
use csv_layout::{Access, Extent};
use csv_types::{ByteRange, Epoch, NodeId};

/// A message with the epoch that it belongs to.
#[derive(Debug, Clone)]
pub struct Body {
    /// Epoch.
    pub epoch: Epoch,
    /// Session, as the coordinator numbers it; 0 before there is one.
    pub session: u64,
    /// What.
    pub what: What,
}

/// See the module.
#[derive(Debug, Clone)]
pub enum What {
    /// Client: I want a session. `client`: which life of csvfs; `hello`: which Hello.
    Hello { client: u64, hello: u64 },
    /// Coordinator: you have one.
    Welcome { hello: u64, resumed: bool, grace: bool },
    /// Client: everything that I hold; nothing else.
    Reclaim { files: Vec<(FileNo, Vec<HeldGrant>)> },
    /// Coordinator: taken over.
    Reclaimed,
    /// Client: my lease, please.
    Ping { sent_ms: u64 },
    /// Coordinator: renewed.
    Pong { sent_ms: u64 },
    /// Client: I want a layout.
    Get { request: u64, file: FileNo, range: ByteRange, access: Access },
    /// Coordinator: here it is.
    Grant { request: u64, file: FileNo, seq: u64, range: ByteRange, access: Access, extents: Vec<Extent> },
    /// Coordinator: you do not get it.
    NoGrant { request: u64 },
    /// Coordinator: give it back.
    Recall { file: FileNo, recall_id: u64, range: ByteRange, up_to_seq: u64, keep_read: bool },
    /// Client: given back.
    Return { file: FileNo, range: ByteRange, up_to_seq: u64, recall_id: u64 },
    /// Client: make a hole.
    Punch { file: FileNo, range: ByteRange },
    /// Coordinator: everything of yours is gone.
    Revoked,
}

/// Orders of csvd, as csvfs takes them.
#[derive(Debug, Clone)]
pub enum Order {
    /// Coordinate the volume. `gone`: nodes that are not waited for.
    Take { epoch: Epoch, gone: Vec<NodeId> },
    /// Follow that owner.
    Follow { epoch: Epoch, owner: NodeId },
    /// End the ownership in good order.
    HandOver { epoch: Epoch },
    /// These are fenced.
    Gone { epoch: Epoch, nodes: Vec<NodeId> },
    /// Stop all I/O.
    Suspend,
}
