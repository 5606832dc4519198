//! Volumes: who owns them, and who may write their LUN.
//!
//! ```text
//!            VolumeAssign (epoch+1)                    VolumeOnline
//! Offline ──────────────────────────> Starting ──────────────────────> Online
//!    ^  ^                              |  ^  ^                           | ^
//!    |  └───── VolumeStartFailed ──────┘  |  └─ VolumeAssign (epoch+1) ──┤ | VolumeReleaseCancelled
//!    |                                    |                VolumeRelease v |
//!    |                                    └─ VolumeReleased (epoch+1) ─ Releasing
//!    └────────────────────── VolumeReleased (offline wanted, or target gone) ┘
//! VolumeUnowned: Starting, Online, Releasing -> Offline, when the owner is gone and nobody else can take the volume.
//! VolumeFail: Offline -> Failed, after too many failed starts; VolumeBringOnline: Failed -> Offline.
//! ```
//!
//! A **member** is a node that has, or had, a key on the LUN. `Admitted` may write. `FencePending`: the majority has
//! decided that its key must go; the owner preempts it and says so (`VolumeOnline`, `VolumeFenced`). `Fenced`: the key is
//! known to be gone (preempted, or withdrawn by the node itself after its I/O had ended: `VolumeWithdraw`). A member never comes back under the same generation, so the key of a fenced member is dead for ever.
//!
//! Contract of the nodes
//! * A node registers the key of a new generation only after all its I/O under earlier ones has ended.
//! * The owner opens the file system only after each `FencePending` key is gone, and says `VolumeOnline` with that list.
//! * `VolumeReleased` and `VolumeStartFailed` mean: the file system is closed here, and nothing of it will be written
//!   under that epoch any more.

use csv_types::{Epoch, NodeId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Name of the directory under `/ClusterStorage`.
    pub name: String,
    /// Identity in the label of its LUN.
    pub id: VolumeId,
    /// File system, one of [`FILE_SYSTEMS`].
    pub fs: String,
    /// Tells its ports from those of other volumes.
    #[serde(default)]
    pub index: u16,
    /// Owners by preference, best first; may be empty.
    pub preferred: Vec<NodeId>,
    /// Does the administrator want it online?
    pub want_online: bool,
    /// The owner; set in `Starting`, `Online` and `Releasing`, and only there.
    pub owner: Option<NodeId>,
    /// Number of the ownership; only grows, each owner's turn has its own.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: VolumeState,
    /// Who has or had a key on the LUN.
    pub members: BTreeMap<NodeId, Member>,
    /// In its state since (Unix ms).
    pub since_unix_ms: u64,
    /// Failed starts since it was last online, oldest first, at most [`FAILURES_MAX`].
    pub failures: Vec<StartFailure>,
}

/// The file systems that a volume can have, by the names in its label.
pub const FILE_SYSTEMS: [&str; 2] = ["ext4", "xfs"];

/// Failed starts that are remembered per volume.
pub const FAILURES_MAX: usize = 256;

/// Where a volume stands; see the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Nobody owns it.
    Offline {
        /// Why.
        reason: String,
    },
    /// The owner fences, mounts and exports it.
    Starting {
        /// Why this owner was chosen.
        reason: String,
    },
    /// The owner serves it.
    Online,
    /// The owner serves what is under way and closes it.
    Releasing {
        /// Who gets it; nobody when it goes offline.
        to: Option<NodeId>,
        /// Why.
        reason: String,
    },
    /// Could not be brought online; waits for the administrator or for `failed_retry_ms`.
    Failed {
        /// Why.
        reason: String,
    },
}

impl VolumeState {
    /// Does a volume in this state have an owner?
    #[must_use]
    pub fn owned(&self) -> bool {
        match self {
            VolumeState::Starting { .. } | VolumeState::Online | VolumeState::Releasing { .. } => true,
            VolumeState::Offline { .. } | VolumeState::Failed { .. } => false,
        }
    }

    /// Its reason; empty when online.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            VolumeState::Offline { reason }
            | VolumeState::Starting { reason }
            | VolumeState::Releasing { reason, .. }
            | VolumeState::Failed { reason } => reason,
            VolumeState::Online => "",
        }
    }
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VolumeState::Offline { .. } => "Offline",
            VolumeState::Starting { .. } => "Starting",
            VolumeState::Online => "Online",
            VolumeState::Releasing { .. } => "Releasing",
            VolumeState::Failed { .. } => "Failed",
        })
    }
}

/// A node's standing on a volume's LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Number of its key, from 1 on; grows with each admission. See [`super::key`].
    pub generation: u32,
    /// The node's incarnation that was admitted.
    pub incarnation: u64,
    /// May it write?
    pub state: MemberState,
}

/// May a member write the LUN?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberState {
    /// Yes.
    Admitted,
    /// No, but its key may still be there: the owner must preempt it.
    FencePending,
    /// No, and its key is gone.
    Fenced,
}

/// A start that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailure {
    /// On which node.
    pub node: NodeId,
    /// When (Unix ms).
    pub at_unix_ms: u64,
    /// Why.
    pub why: String,
}

impl Volume {
    /// The member, if it may write.
    #[must_use]
    pub fn admitted(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node).filter(|member| member.state == MemberState::Admitted)
    }

    /// Whose keys must go: node and generation.
    #[must_use]
    pub fn to_fence(&self) -> Vec<(NodeId, u32)> {
        let pending = self.members.iter().filter(|(_, member)| member.state == MemberState::FencePending);
        pending.map(|(&node, member)| (node, member.generation)).collect()
    }

    /// Failed starts on that node since the volume was last online.
    #[must_use]
    pub fn failures_on(&self, node: NodeId) -> usize {
        self.failures.iter().filter(|failure| failure.node == node).count()
    }
}
