//! What a coordinator is started with, and what it answers its sessions through.

use csv_proto::ServerMessage;
use csv_types::{Epoch, NodeId};
use rustix::io::Errno;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// File system of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsKind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

/// Takes events: a stable kind and a message that says what happened, to what, and why. Must not block
/// and must not call back into the coordinator.
pub type EventSink = Arc<dyn Fn(&str, String) + Send + Sync>;

/// Makes sure that a node can write the LUN no more. May block. `true` when that is certain at return; `false`
/// when it cannot be done here: the coordinator then waits until the node's lease is over.
pub type Fence = Arc<dyn Fn(NodeId) -> bool + Send + Sync>;

/// Is the LUN still this node's to write? Asked when the file system fails, before anybody is told: on a node that was
/// fenced everything fails, and it is the next coordinator that knows the answers. May block.
pub type Confirm = Arc<dyn Fn() -> bool + Send + Sync>;

/// Everything that a coordinator needs to know.
#[derive(Clone)]
pub struct Options {
    /// Name of the volume; a Hello must carry it.
    pub volume_name: String,
    /// Identity of the volume, told to every session.
    pub volume_id: uuid::Uuid,
    /// Number of this ownership.
    pub epoch: Epoch,
    /// The LUN's block device.
    pub device: PathBuf,
    /// Its file system.
    pub fs_kind: FsKind,
    /// Mount read-only.
    pub read_only: bool,
    /// The last ownership ended without writing back, or nobody knows: told to every session, which then tells whoever
    /// had not synced.
    pub unsynced_lost: bool,
    /// A layout may be used for this long after the coordinator was last heard.
    pub lease_ms: u64,
    /// A recalled layout must be back within this time.
    pub recall_ms: u64,
    /// Bounds.
    pub limits: Limits,
    /// All nodes of the cluster with their names, at the start.
    pub nodes: Vec<(NodeId, String)>,
    /// Nodes that are known to be unable to write the LUN: what they held is free, nobody waits for them.
    pub gone: Vec<NodeId>,
    /// Orders that stand: file-system redirection for everybody, for these nodes, and maintenance.
    pub redirect_all: bool,
    /// See `redirect_all`.
    pub redirect_nodes: Vec<NodeId>,
    /// See `redirect_all`.
    pub maintenance: bool,
    /// The node on which this coordinator runs.
    pub own_node: NodeId,
    /// Where events go.
    pub on_event: EventSink,
    /// How a node is fenced.
    pub fence: Fence,
    /// Whether this node is.
    pub confirm: Confirm,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("volume_name", &self.volume_name)
            .field("epoch", &self.epoch)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// Bounds of a coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Calls of one session that may be under way; one more is answered with EAGAIN. Waiting locks do not count.
    pub calls_per_session_max: usize,
    /// Replies of one session that are remembered for repeated calls.
    pub replies_per_session_max: usize,
    /// Open handles of one session; one more is answered with ENFILE.
    pub opens_per_session_max: usize,
    /// Worker threads.
    pub threads_max: usize,
    /// Files with metadata leases; beyond it replies carry no lease.
    pub leased_files_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            calls_per_session_max: 1024,
            replies_per_session_max: 4096,
            opens_per_session_max: 1 << 18,
            threads_max: 128,
            leased_files_max: 1 << 18,
        }
    }
}

/// Way back to one session's node. Calls arrive in the order in which the coordinator decided; they must not
/// block and must not call back into the coordinator. What is lost here is sent again when the session resumes.
pub trait Outbox: Send + Sync {
    /// Queues a message.
    fn send(&self, msg: ServerMessage);
    /// The connection is of no more use; the text says why.
    fn close(&self, why: &str);
}

/// A session as its connection knows it. Cheap to clone; of no more effect once the session is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRef {
    pub(crate) node: NodeId,
    /// Which of the node's sessions.
    pub(crate) session: u64,
    /// Which of the session's connections.
    pub(crate) connection: u64,
}

impl SessionRef {
    /// The node at the other end.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }
}

/// A Hello that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason} ({errno})")]
pub struct Refusal {
    /// For the other end.
    pub errno: Errno,
    /// For people.
    pub reason: String,
}

/// What `Coordinator::order` changes; absent fields stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Order {
    /// File-system redirection on request.
    pub redirect: Option<bool>,
    /// Data operations wait.
    pub maintenance: Option<bool>,
    /// `redirect` is for this node only.
    pub node: Option<NodeId>,
}
