//! Nodes of the cluster.
//!
//! **Incarnation.** A number that a node chooses, greater each time. Taking a new one is a promise: nothing of the
//! node's earlier incarnations can write a LUN any more (the machine booted, or csvd ended every csvfs and saw its I/O
//! drained). A csvd that starts again and adopts running csvfs processes keeps its incarnation. A node that finds
//! itself `Down` in the database must take a new one before it may be `Up` again. A fence of an older
//! incarnation's key therefore protects against machines that are *not* back; it never stands in a node's own way.

use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Number, from 1 on, never given out twice in the life of the cluster.
    pub id: NodeId,
    /// Unique name; also the DNS name in its certificate.
    pub name: String,
    /// Unique address of the control protocol and of SMB.
    pub addr: IpAddr,
    /// Highest feature level that its software knows.
    pub feature_level: u32,
    /// Version of its software, for people.
    pub version: String,
    /// May it vote? (`csvctl quorum set`; what dynamic quorum makes of it is in `quorum`.)
    pub vote: bool,
    /// What the cluster knows of it.
    pub state: NodeState,
    /// What the administrator wants of it.
    pub admin: AdminState,
    /// It said that it is about to stop: its volumes and its vote are moved away first. Cleared when it is up again or
    /// resumed.
    #[serde(default)]
    pub leaving: bool,
    /// Its incarnation; see the module's text. 0 before it was up for the first time.
    pub incarnation: u64,
    /// When it failed lately (Unix ms), oldest first; inside the quarantine window.
    pub failures: Vec<u64>,
    /// Kept out until then (Unix ms).
    pub quarantined_until_unix_ms: Option<u64>,
    /// SHA-256 of its certificate, lower-case hex; empty until it has one.
    pub cert_sha256: String,
    /// In its state since (Unix ms).
    pub since_unix_ms: u64,
    /// Why it is isolated or down; empty when it is up.
    pub down_reason: String,
    /// It is down because it stopped in good order: nothing of it runs any more.
    #[serde(default)]
    pub stopped: bool,
}

/// What the cluster knows of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// Added, not heard yet.
    Joining,
    /// Heard and in.
    Up,
    /// Not heard, but not given up yet: keeps its volumes, gets none.
    Isolated,
    /// Given up: its volumes move, its keys are fenced.
    Down,
}

/// What the administrator wants of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdminState {
    /// Owns volumes.
    Active,
    /// Keeps the volumes that it has, gets no more.
    Paused,
    /// Its volumes are being moved away; becomes `Paused` when none is left.
    Draining,
}

/// A node's state as shown (design 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DisplayState {
    /// In, and owns volumes.
    Up,
    /// Not in.
    Down,
    /// In, gets no volumes.
    Paused,
    /// Added, not heard yet.
    Joining,
    /// In, its volumes are moving away.
    Draining,
    /// Not heard, not given up yet.
    Isolated,
    /// Kept out after too many failures.
    Quarantined,
}

impl fmt::Display for DisplayState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DisplayState::Up => "Up",
            DisplayState::Down => "Down",
            DisplayState::Paused => "Paused",
            DisplayState::Joining => "Joining",
            DisplayState::Draining => "Draining",
            DisplayState::Isolated => "Isolated",
            DisplayState::Quarantined => "Quarantined",
        })
    }
}

impl Node {
    /// The one word to show.
    #[must_use]
    pub fn display_state(&self, now_unix_ms: u64) -> DisplayState {
        match self.state {
            NodeState::Isolated => DisplayState::Isolated,
            NodeState::Joining | NodeState::Down if self.quarantined(now_unix_ms) => {
                DisplayState::Quarantined
            }
            NodeState::Joining => DisplayState::Joining,
            NodeState::Down => DisplayState::Down,
            NodeState::Up if self.leaving => DisplayState::Draining,
            NodeState::Up => match self.admin {
                AdminState::Active => DisplayState::Up,
                AdminState::Paused => DisplayState::Paused,
                AdminState::Draining => DisplayState::Draining,
            },
        }
    }

    /// Kept out at that time?
    #[must_use]
    pub fn quarantined(&self, now_unix_ms: u64) -> bool {
        self.quarantined_until_unix_ms.is_some_and(|until| now_unix_ms < until)
    }

    /// Is it in?
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state == NodeState::Up
    }

    /// May it be given a volume, as far as its own state goes?
    #[must_use]
    pub fn takes_volumes(&self) -> bool {
        self.is_up() && self.admin == AdminState::Active && !self.leaving
    }

    /// Are its volumes to be moved away in good order?
    #[must_use]
    pub fn gives_volumes_up(&self) -> bool {
        self.is_up() && (self.admin == AdminState::Draining || self.leaving)
    }
}
