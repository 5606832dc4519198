//! What csvd tells of the cluster: the answers that `csvctl` prints.

use csv_types::NodeId;
use serde::{Deserialize, Serialize};

/// Answer to `ClusterRequest::Status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Name; empty when this node is in no cluster.
    pub name: String,
    /// Identity.
    pub id: uuid::Uuid,
    /// The node that tells.
    pub node: String,
    /// Why this node is cut off, if it is.
    pub cut_off: Option<String>,
    /// Feature level of the cluster.
    pub feature_level: u32,
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// Raft's term.
    pub term: u64,
    /// Index of the last entry in this node's database.
    pub applied: u64,
    /// All nodes.
    pub nodes: Vec<NodeStatus>,
    /// Who votes, and what the cluster can lose.
    pub quorum: QuorumStatus,
}

/// A row of `csvctl node list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Number.
    pub id: NodeId,
    /// Name.
    pub name: String,
    /// Address.
    pub addr: String,
    /// Up, Down, Paused, Joining, Draining, Isolated or Quarantined.
    pub state: String,
    /// Why it is down, or else empty.
    pub reason: String,
    /// Since when, Unix milliseconds.
    pub since_unix_ms: u64,
    /// It votes now.
    pub votes: bool,
    /// Volumes that it owns.
    pub volumes: Vec<String>,
    /// Its software.
    pub version: String,
}

/// Answer of `csvctl quorum show`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuorumStatus {
    /// The witness, in words.
    pub witness: String,
    /// On which node the disk witness runs, by the word of its LUN.
    #[serde(default)]
    pub witness_at: Option<String>,
    /// What is wrong with the disk witness on the telling node.
    #[serde(default)]
    pub witness_problem: Option<String>,
    /// Votes follow the nodes that are up.
    pub dynamic: bool,
    /// Names of those who vote now.
    pub voters: Vec<String>,
    /// Names of voters that answer (as the telling node sees it).
    pub live: Vec<String>,
    /// More voters that may fail at the same time; `None` without quorum.
    pub tolerates: Option<usize>,
}
