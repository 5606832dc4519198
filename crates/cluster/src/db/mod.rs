//! The cluster database: the replicated state machine. Every node applies the same commands in the same order and has
//! the same database; what runs on a node follows from it, level-triggered.
//!
//! Invariants ([`ClusterDb::check`])
//! * `apply` is deterministic: ordered maps only, time comes in the command.
//! * A refused command changes nothing. A doubled one is refused or answers `Unchanged`.
//! * A volume's epoch only grows, and each owner's turn has its own: at most one owner per epoch.
//! * A volume goes online only when no key that must go is left; see [`volume`].
//! * Node numbers and event numbers are never given out twice; events have no gaps.
//!
//! Failure: nothing here can fail but by refusal. A log entry that cannot be decoded is the caller's matter: it must
//! stop, since it would differ from the others from then on.

mod apply;
mod check;
pub mod checkpoint;
pub mod command;
pub mod events;
pub mod group;
mod hex;
pub mod key;
pub mod node;
pub mod quorum_config;
pub mod refused;
pub mod resource;
pub mod settings;
pub mod volume;

#[cfg(test)]
pub(crate) mod tests;

pub use apply::restore::{RESTORE_EPOCHS, RESTORE_GENERATIONS, RESTORE_NODES};
pub use checkpoint::{FileHead, Followed};
pub use command::{
    Answer, Applied, Command, DecodeError, Envelope, FEATURE_LEVEL, Init, NewNode, NewResource, Ownership,
    ResourceChange, decode_answer, encode_answer,
};
pub use events::{Event, EventKind, Events, Level, NewEvent};
pub use group::{
    AntiAffinity, Failback, Group, GroupFailure, GroupPolicy, GroupState, MoveCause, MoveKind,
    PRIORITY_DEFAULT, PRIORITY_MAX,
};
pub use key::{KeyParts, parse_key, parse_own_key, reservation_key};
pub use node::{AdminState, DisplayState, Node, NodeState};
pub use quorum_config::{QuorumConfig, Witness};
pub use refused::Refused;
pub use resource::{Guard, LibraryType, Resource, ResourcePolicy, ResourceState, ResourceStatus};
pub use settings::{BalanceLevel, BalanceMode, Rebalance, SettingEntry, SettingError, Settings};
pub use volume::{Member, MemberState, StartFailure, Volume, VolumeState};

use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use uuid::Uuid;

/// Version of the snapshot's form. A newer one is refused.
pub const FORMAT: u32 = 1;
/// Nodes of a cluster.
pub const NODES_MAX: usize = 64;
/// Volumes of a cluster.
pub const VOLUMES_MAX: usize = 256;
/// Join tokens at a time.
pub const TOKENS_MAX: usize = 64;
/// What a node that is cut off needs to end its groups, in milliseconds.
pub const STOP_MS: u64 = 3_000;
/// Groups, resources, properties and checkpoints: of each at most so many.
pub const RECORDS_MAX: usize = 4096;
/// Bytes of a property, and of all properties of a resource.
pub const PROPERTY_BYTES_MAX: usize = 64 << 10;
/// Bytes of a checkpoint. In hexadecimal, with its name, it fits into a command of 1 MiB.
pub const CHECKPOINT_BYTES_MAX: usize = 500 << 10;
/// Bytes of all groups, resources, properties and checkpoints together (checkpoints as hexadecimal): a snapshot of a full
/// database, in which a byte takes up to six, stays below what a voter takes in.
pub const RECORDS_BYTES_MAX: usize = 32 << 20;

/// The database. `default()` is the empty one before `Init`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterDb {
    /// Version of the form.
    pub format: u32,
    /// Name of the cluster; empty before `Init`.
    pub name: String,
    /// Identity of the cluster; nil before `Init`.
    pub id: Uuid,
    /// Commands up to this level are taken.
    pub feature_level: u32,
    /// Settings.
    #[serde(default)]
    pub settings: Settings,
    /// Witness and dynamic quorum.
    #[serde(default)]
    pub quorum: QuorumConfig,
    /// Nodes by number.
    pub nodes: BTreeMap<NodeId, Node>,
    /// By whose clock each node that is down is so since then.
    #[serde(default)]
    pub down_by: BTreeMap<NodeId, NodeId>,
    /// Number of the next node.
    pub next_node_id: u32,
    /// Highest epoch of any volume that was removed: a volume that is added again starts above it.
    #[serde(default)]
    pub epoch_floor: u64,
    /// Highest generation of any member of a volume that was removed: no key is ever made twice.
    #[serde(default)]
    pub generation_floor: u32,
    /// Volumes by name.
    pub volumes: BTreeMap<String, Volume>,
    /// Join tokens by the SHA-256 of their secret (lower-case hex).
    pub tokens: BTreeMap<String, Token>,
    /// CA and passwords.
    pub secrets: Secrets,
    /// Groups by name.
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    /// Resources by name.
    #[serde(default)]
    pub resources: BTreeMap<String, Resource>,
    /// Resource types in shared libraries, by name.
    #[serde(default)]
    pub types: BTreeMap<String, LibraryType>,
    /// Properties of the cluster.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
    /// Checkpoints of resources.
    #[serde(default, with = "hex::map")]
    pub checkpoints: BTreeMap<String, Vec<u8>>,
    /// Event log.
    pub events: Events,
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Good until then (Unix ms).
    pub expires_unix_ms: u64,
    /// Nodes that may still join with it.
    pub uses_left: u32,
}

/// What must not be shown.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    /// Certificate of the cluster's CA.
    pub ca_cert_pem: String,
    /// Key of the cluster's CA.
    pub ca_key_pem: String,
    /// Password of the private SMB account.
    pub smb_password: String,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(..)")
    }
}

/// A snapshot that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Made by newer software.
    #[error(
        "the cluster database has format {found}, this csvd reads up to {known}: install a csvd on this node that is as new as the others'"
    )]
    Newer {
        /// Its format.
        found: u32,
        /// What this software reads.
        known: u32,
    },
    /// Not a snapshot.
    #[error(
        "the cluster database cannot be read ({0}): run `csvctl cluster rejoin` to get it from the other nodes"
    )]
    Damaged(String),
    /// It contradicts itself.
    #[error("the cluster database contradicts itself ({0}): restore a backup or run `csvctl cluster rejoin`")]
    Inconsistent(String),
}

impl Default for ClusterDb {
    fn default() -> Self {
        ClusterDb {
            format: FORMAT,
            name: String::new(),
            id: Uuid::nil(),
            feature_level: 0,
            settings: Settings::default(),
            quorum: QuorumConfig::default(),
            nodes: BTreeMap::new(),
            down_by: BTreeMap::new(),
            next_node_id: 1,
            epoch_floor: 0,
            generation_floor: 0,
            volumes: BTreeMap::new(),
            tokens: BTreeMap::new(),
            secrets: Secrets::default(),
            groups: BTreeMap::new(),
            resources: BTreeMap::new(),
            types: BTreeMap::new(),
            properties: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            events: Events::default(),
        }
    }
}

impl ClusterDb {
    /// The whole database, as JSON.
    #[must_use]
    pub fn encode_snapshot(&self) -> Vec<u8> {
        // Cannot fail: every map has text or numbers for keys.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what `encode_snapshot` made. Fields that this version does not know are passed over.
    ///
    /// # Errors
    /// A newer format; not a snapshot; one that breaks an invariant.
    pub fn decode_snapshot(bytes: &[u8]) -> Result<ClusterDb, SnapshotError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let damaged = |error: serde_json::Error| SnapshotError::Damaged(error.to_string());
        let head: Head = serde_json::from_slice(bytes).map_err(damaged)?;
        if head.format > FORMAT {
            return Err(SnapshotError::Newer { found: head.format, known: FORMAT });
        }
        let db: ClusterDb = serde_json::from_slice(bytes).map_err(damaged)?;
        db.check().map_err(SnapshotError::Inconsistent)?;
        Ok(db)
    }

    /// Has `Init` been applied?
    #[must_use]
    pub fn initialised(&self) -> bool {
        !self.id.is_nil()
    }

    /// The node of that name.
    #[must_use]
    pub fn node_by_name(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.name == name)
    }

    /// A node's name, or its number when it is gone.
    #[must_use]
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| format!("node {}", id.0), |node| node.name.clone())
    }

    /// Names of the volumes that a node owns (starting, online, releasing).
    #[must_use]
    pub fn volumes_of(&self, node: NodeId) -> Vec<&str> {
        let owned = self.volumes.values().filter(|volume| volume.owner == Some(node));
        owned.map(|volume| volume.name.as_str()).collect()
    }

    /// Does the volume's owner still stand as it was chosen: up or only isolated, in the incarnation that was admitted, and not
    /// being fenced? If not, the volume needs another owner, or this one anew.
    #[must_use]
    pub fn owner_stands(&self, volume: &Volume) -> bool {
        let Some(node) = volume.owner.and_then(|owner| self.nodes.get(&owner)) else { return false };
        let member = volume.admitted(node.id).filter(|member| member.incarnation == node.incarnation);
        member.is_some() && matches!(node.state, NodeState::Up | NodeState::Isolated)
    }

    /// Names of the groups that a node owns.
    #[must_use]
    pub fn groups_of(&self, node: NodeId) -> Vec<&str> {
        let owned = self.groups.values().filter(|group| group.owner == Some(node));
        owned.map(|group| group.name.as_str()).collect()
    }

    /// Does the group's owner still stand as it was chosen: up or only isolated, in the incarnation that it had then?
    #[must_use]
    pub fn group_owner_stands(&self, group: &Group) -> bool {
        let Some(node) = group.owner.and_then(|owner| self.nodes.get(&owner)) else { return false };
        node.incarnation == group.incarnation && matches!(node.state, NodeState::Up | NodeState::Isolated)
    }

    /// For how long, in milliseconds, what a node that is down had may still run there; 0 when it has ended for certain: it said
    /// goodbye, or was not heard for as long as a node that is cut off goes on at most ([`Settings::contact_limit_ms`]) and
    /// [`STOP_MS`] more. By the clock of `by`, which is not trusted to have gone forward, nor to show the same time as that of
    /// another node, by which it may be down since then.
    #[must_use]
    pub fn may_run_for_ms(&self, node: &Node, by: NodeId, now_unix_ms: u64) -> u64 {
        if node.stopped {
            return 0;
        }
        let settings = &self.settings;
        let same_clock = self.down_by.get(&node.id) == Some(&by);
        let skew_ms = if same_clock { 0 } else { settings.clock_skew_max_ms };
        let heard = node.since_unix_ms.saturating_sub(settings.silence_ms());
        let silent_ms = now_unix_ms.saturating_sub(heard);
        let limit_ms = settings.contact_limit_ms().saturating_add(STOP_MS).saturating_add(skew_ms);
        limit_ms.saturating_sub(silent_ms)
    }

    /// The key that a node's csvd must have registered on the volume's LUN, if it may write there.
    #[must_use]
    pub fn key_of(&self, volume: &Volume, node: NodeId) -> Option<u64> {
        volume.admitted(node).map(|member| reservation_key(self.id, node, member.generation))
    }

    /// Which of the keys found on the volume's LUN must go: those of members that may not write, and what earlier
    /// generations left behind. Foreign keys, and keys newer than what this copy of the database knows, are left alone.
    #[must_use]
    pub fn stale_keys(&self, volume: &Volume, registered: &[u64]) -> Vec<u64> {
        let stale = |key: u64| {
            let Some((node, generation)) = parse_own_key(self.id, key) else { return false };
            volume.members.get(&node).is_some_and(|member| {
                generation < member.generation
                    || (generation == member.generation && member.state != MemberState::Admitted)
            })
        };
        registered.iter().copied().filter(|&key| stale(key)).collect()
    }
}
