//! What nodes ask each other for `csvctl cluster validate`, and what they answer: facts only, which csvctl judges.
//! And what they ask when a disk witness is made.

use csv_types::NodeId;
use serde::{Deserialize, Serialize};

/// What one csvd asks another, as JSON in the cluster protocol's call `Admin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "node-request", rename_all = "kebab-case")]
pub enum NodeRequest {
    /// What time is it there? Answered with [`Pong`], at once.
    Ping,
    /// Everything. Answered with [`NodeFacts`].
    Check,
    /// About groups; csvd's own.
    Group {
        /// What.
        request: serde_json::Value,
    },
    /// Can the node find a disk witness? Answered with why not, or null.
    SeesWitness {
        /// Its name.
        name: String,
        /// Its identity.
        id: uuid::Uuid,
        /// Where it was made.
        device: std::path::PathBuf,
    },
}

/// Answer to [`NodeRequest::Ping`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The node's clock, Unix milliseconds.
    pub unix_ms: u64,
}

/// What a node says of itself, and of the others as it sees them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Version of its csvd.
    pub version: String,
    /// Highest feature level of its csvd.
    pub feature_level: u32,
    /// Release of its kernel.
    pub kernel: String,
    /// What `smbd --version` says there; absent when it cannot be run.
    pub samba: Option<String>,
    /// Why it is cut off, if so.
    pub cut_off: Option<String>,
    /// Index of the last entry in its database.
    pub applied: u64,
    /// Its volumes.
    pub volumes: Vec<VolumeFacts>,
    /// The other nodes.
    pub peers: Vec<PeerFacts>,
}

/// A volume on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFacts {
    /// Its name.
    pub volume: String,
    /// Where the LUN is on this node, if it has a path.
    pub device: Option<String>,
    /// What the LUN's label says; absent without a path.
    pub lun: Option<LunFacts>,
}

/// What was read from a LUN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LunFacts {
    /// The volume's own label.
    Right,
    /// Something else; what, in words.
    Other(String),
    /// It could not be read.
    Failed(String),
}

/// Another node as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerFacts {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// How it answered.
    pub link: LinkFacts,
}

/// A connection between two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkFacts {
    /// It answers.
    Good {
        /// Shortest round trip, in microseconds.
        rtt_us: u64,
        /// Longest round trip, in microseconds.
        rtt_us_max: u64,
        /// How far its clock is ahead, in milliseconds; right to half of the round trip.
        clock_ahead_ms: i64,
    },
    /// It does not; why.
    Bad(String),
}

/// Answer to `ClusterRequest::Check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFacts {
    /// The node that was asked.
    pub asked: NodeFacts,
    /// The others, by name: what they answered, or why not.
    pub others: Vec<(String, Result<NodeFacts, String>)>,
}
