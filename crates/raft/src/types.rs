//! The types that openraft is instantiated with, and what the users of the crate give and get.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// Number of a voter or learner. A node's voter id is its node id; it is never used again for another one.
pub type VoterId = u64;

/// How a voter is called and reached; part of the replicated membership.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftNode {
    /// Name of the node, for messages.
    pub name: String,
    /// Address in the form that the [`crate::Transport`] understands.
    pub addr: String,
}

/// Whose records these are. Stands in every file header and in every message, so that a directory, a LUN or an
/// address that belongs to another cluster or another node is never taken for one's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Id of the cluster.
    pub cluster: Uuid,
    /// Id of this voter.
    pub voter: VoterId,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "voter {} of cluster {}", self.voter, self.cluster)
    }
}

/// What the log is for. It is driven by one thread at a time, in log order.
pub trait StateMachine: Send + 'static {
    /// Applies the committed command with this log index and returns the answer for whoever proposed it. Must be
    /// deterministic. After a restart the commands behind the newest snapshot are applied again.
    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8>;

    /// The whole state as bytes.
    fn snapshot(&self) -> Vec<u8>;

    /// Replaces the state by a snapshot, possibly of another node.
    ///
    /// # Errors
    /// In plain words, when the bytes cannot be understood (a newer version wrote them). The node stops then.
    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String>;
}

/// A command of the log. The bytes mean nothing to this crate.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    bytes: Arc<[u8]>,
    /// Set when the command was handed to the log of the node where it was proposed: from then on a refusal does
    /// not mean that it will never be applied.
    appended: Option<Arc<AtomicBool>>,
}

impl Command {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Command { bytes: bytes.into(), appended: None }
    }

    /// A command whose way into the log its proposer watches.
    pub(crate) fn watched(bytes: &[u8]) -> (Self, Arc<AtomicBool>) {
        let flag = Arc::new(AtomicBool::new(false));
        (Command { bytes: bytes.into(), appended: Some(flag.clone()) }, flag)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn mark_appended(&self) {
        if let Some(flag) = &self.appended {
            flag.store(true, Ordering::Release);
        }
    }
}

impl PartialEq for Command {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

/// What the state machine answered to a command; empty for entries that are not commands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer(pub(crate) Vec<u8>);

openraft::declare_raft_types!(
    /// The types of this crate's openraft instance.
    pub(crate) TypeConfig:
        D            = Command,
        R            = Answer,
        NodeId       = VoterId,
        Node         = RaftNode,
        Entry        = openraft::Entry<TypeConfig>,
        SnapshotData = Arc<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub(crate) type LogId = openraft::LogId<VoterId>;
pub(crate) type Vote = openraft::Vote<VoterId>;
pub(crate) type Entry = openraft::Entry<TypeConfig>;
pub(crate) type Membership = openraft::Membership<VoterId, RaftNode>;
pub(crate) type StoredMembership = openraft::StoredMembership<VoterId, RaftNode>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<VoterId, RaftNode>;
pub(crate) type Snapshot = openraft::Snapshot<TypeConfig>;
pub(crate) type StorageError = openraft::StorageError<VoterId>;
