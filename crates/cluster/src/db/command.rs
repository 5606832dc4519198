//! Commands: every way to change the database. Each carries what it was decided on (epoch, incarnation,
//! generation), so that `apply` can refuse one that comes late, twice or out of order.

use super::Secrets;
use super::events::NewEvent;
use super::group::{GroupPolicy, GroupState, MoveCause, MoveKind};
use super::node::AdminState;
use super::quorum_config::QuorumConfig;
use super::refused::Refused;
use super::resource::{LibraryType, ResourcePolicy, ResourceStatus};
use csv_types::{Epoch, NodeId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use uuid::Uuid;

/// Highest feature level that this software knows.
pub const FEATURE_LEVEL: u32 = 2;

/// A command with its time and its sender; what goes through the Raft log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Wall clock of the sender (Unix ms). The only time that `apply` knows.
    pub at_unix_ms: u64,
    /// Who proposed it.
    pub by: NodeId,
    /// What to do.
    pub command: Command,
}

/// Bytes that are not a command, or one of a newer version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a command of the cluster database cannot be read ({0}): it comes from a newer version of csvd or is damaged; update this node"
)]
pub struct DecodeError(pub String);

impl Envelope {
    /// For the log.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// From the log.
    ///
    /// # Errors
    /// Not JSON, or a command that this version does not know. The node must stop then: it cannot go on with a
    /// database that differs from the others'.
    pub fn decode(bytes: &[u8]) -> Result<Envelope, DecodeError> {
        serde_json::from_slice(bytes).map_err(|error| DecodeError(error.to_string()))
    }
}

/// What `apply` answers when it took a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Applied {
    /// Done.
    Done,
    /// It was so already (a doubled command); nothing changed.
    Unchanged,
    /// The new node's number.
    Node(NodeId),
    /// The volume's epoch after a change of owner.
    Epoch(Epoch),
    /// Generation and key of an admitted member.
    Member {
        /// Generation.
        generation: u32,
        /// Reservation key to register.
        key: u64,
    },
}

/// The whole answer to a command, as it goes back through Raft.
pub type Answer = Result<Applied, Refused>;

/// For the way back.
#[must_use]
pub fn encode_answer(answer: &Answer) -> Vec<u8> {
    serde_json::to_vec(answer).unwrap_or_default()
}

/// From the way back.
///
/// # Errors
/// Not an answer, or one of a newer version.
pub fn decode_answer(bytes: &[u8]) -> Result<Answer, DecodeError> {
    serde_json::from_slice(bytes).map_err(|error| DecodeError(error.to_string()))
}

/// Contents of [`Command::Init`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    /// Name of the cluster, 1 to 15 characters.
    pub name: String,
    /// Identity of the cluster.
    pub id: Uuid,
    /// The first node.
    pub node: NewNode,
    /// CA and passwords.
    pub secrets: Secrets,
    /// Settings that differ from the defaults.
    pub settings: Vec<(String, String)>,
}

/// What a node says of itself when it is added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    /// Name, unique.
    pub name: String,
    /// Address, unique.
    pub addr: IpAddr,
    /// Highest feature level of its software.
    pub feature_level: u32,
    /// Version of its software.
    pub version: String,
    /// SHA-256 of its certificate, hex; may be empty until `NodeCertificate`.
    pub cert_sha256: String,
}

/// A node's turn of having a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// The group.
    pub group: String,
    /// Number of the turn.
    pub generation: u64,
    /// Whose.
    pub node: NodeId,
}

/// A change of the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Makes the cluster and its first node (number 1, `Joining`). Only on an empty database.
    Init(Box<Init>),
    /// This node goes on alone, by force: the first entry of the log after the membership of one. What the others have decided is
    /// not known, so every key that they may have must go, and all numbers go on above a margin.
    ForceStart { node: NodeId },
    /// Adds a node (`Joining`).
    NodeAdd {
        /// The node.
        node: NewNode,
        /// SHA-256 of its join token's secret, hex.
        token_sha256: String,
        /// The number that its certificate was made for; refused when it would get another. `None`: any.
        expect_id: Option<NodeId>,
    },
    /// The machine of a node that is down comes back without its database: the old node goes, a new one of the same name
    /// (`Joining`) takes its place, its vote and its rank among preferred owners.
    NodeReplace {
        /// The node that goes.
        old: NodeId,
        /// The new one; its name is that of the old one.
        node: NewNode,
        /// SHA-256 of its join token's secret, hex.
        token_sha256: String,
        /// The number that its certificate was made for.
        expect_id: NodeId,
    },
    /// The node is heard. Also back from `Isolated`, and with a greater incarnation from `Up` (it started again unnoticed).
    NodeUp { node: NodeId, incarnation: u64 },
    /// The node is not heard, but keeps its volumes for `isolation_ms`.
    NodeIsolated { node: NodeId, incarnation: u64, reason: String },
    /// The node is given up: each of its keys must be fenced. `planned`: it said before that it would stop, which counts no
    /// failure; when it says this itself too, nothing of it runs any more.
    NodeDown { node: NodeId, incarnation: u64, reason: String, planned: bool },
    /// The node is about to stop: its volumes and its vote move away; then it goes `NodeDown { planned: true }`.
    NodeLeave { node: NodeId, incarnation: u64 },
    /// No more volumes; with `drain`, those that it has are moved away.
    NodePause { node: NodeId, drain: bool },
    /// The manager: a draining node owns nothing any more.
    NodeDrained { node: NodeId },
    /// Takes volumes again.
    NodeResume { node: NodeId },
    /// Lets a quarantined node in and forgets its failures.
    NodeClearQuarantine { node: NodeId },
    /// Removes a node for good. Its number is never used again.
    NodeEvict { node: NodeId },
    /// The node has another address.
    NodeAddr { node: NodeId, addr: IpAddr },
    /// The node runs other software.
    NodeVersion { node: NodeId, feature_level: u32, version: String },
    /// The node has a (new) certificate.
    NodeCertificate { node: NodeId, cert_sha256: String },
    /// May the node vote?
    NodeVote { node: NodeId, vote: bool },

    /// A new volume; the manager brings it online. `label_epoch` is what the LUN's label says (0 on a new one).
    VolumeAdd { name: String, id: VolumeId, fs: String, preferred: Vec<NodeId>, label_epoch: Epoch },
    /// Forgets a volume that is offline. The LUN is not touched.
    VolumeRemove { name: String },
    /// Gives the volume to a node under the next epoch; fences the last owner unless it released the volume.
    VolumeAssign { name: String, from_epoch: Epoch, to: NodeId, reason: String },
    /// The owner serves it, after it fenced these (node, generation).
    VolumeOnline { name: String, epoch: Epoch, node: NodeId, fenced: Vec<(NodeId, u32)> },
    /// The owner: it could not bring the volume online, and has closed everything again.
    VolumeStartFailed { name: String, epoch: Epoch, node: NodeId, why: String },
    /// Planned move away from the owner; `to: None` only with the volume wanted offline.
    VolumeRelease { name: String, epoch: Epoch, to: Option<NodeId>, reason: String },
    /// The owner: it has closed the volume and will write nothing more under this epoch.
    VolumeReleased { name: String, epoch: Epoch, node: NodeId },
    /// The owner's csvfs has ended by itself, and the file system is closed there: nothing of it will be written any more.
    /// Nobody need be fenced.
    VolumeClosed { name: String, epoch: Epoch, node: NodeId, why: String },
    /// The owner: it serves the volume again after all.
    VolumeReleaseCancelled { name: String, epoch: Epoch, node: NodeId, reason: String },
    /// The manager: the owner is gone and no node can take the volume.
    VolumeUnowned { name: String, from_epoch: Epoch, reason: String },
    /// The manager: it cannot be brought online anywhere.
    VolumeFail { name: String, from_epoch: Epoch, reason: String },
    /// The owner could not get a layout back from a node: it must be fenced.
    VolumeFence { name: String, epoch: Epoch, node: NodeId, generation: u32, reason: String },
    /// The owner has fenced these.
    VolumeFenced { name: String, epoch: Epoch, fenced: Vec<(NodeId, u32)> },
    /// A node: all its I/O under that generation is over and its key is unregistered; as good as a fence.
    VolumeWithdraw { name: String, node: NodeId, incarnation: u64, generation: u32 },
    /// A node wants direct I/O under a new key. `from_generation` is what it had (0: nothing); all I/O of that is over.
    VolumeAdmit { name: String, node: NodeId, incarnation: u64, from_generation: u32 },
    /// Takes a volume offline and keeps it there.
    VolumeOffline { name: String, reason: String },
    /// Wants a volume online (again); forgets failed starts.
    VolumeBringOnline { name: String },
    /// Owners by preference.
    VolumePreferred { name: String, preferred: Vec<NodeId> },

    /// Witness and dynamic quorum.
    QuorumSet { config: QuorumConfig },
    /// A setting, as an administrator types it.
    Setting { key: String, value: String },
    /// A property of the cluster; `None` removes it.
    Property { key: String, value: Option<String> },
    /// A resource's checkpoint. With `owner` it is refused when that has ended: what is late must not replace what is newer.
    CheckpointPut {
        name: String,
        #[serde(with = "super::hex")]
        value: Vec<u8>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<Ownership>,
    },
    /// Forgets a checkpoint.
    CheckpointDelete { name: String },
    /// A join token, by the SHA-256 of its secret.
    TokenAdd { sha256: String, expires_unix_ms: u64, uses: u32 },
    /// Makes a join token useless.
    TokenRevoke { sha256: String },
    /// Events that nodes saw, at most [`EVENTS_PER_COMMAND_MAX`].
    EventAdd { events: Vec<NewEvent> },
    /// CA and passwords.
    SecretsSet { secrets: Secrets },
    /// Lets commands of this level in; every node must know it.
    RaiseFeatureLevel { level: u32 },

    /// A new group without resources, not wanted online.
    GroupAdd { name: String, policy: GroupPolicy },
    /// Another policy.
    GroupPolicy { name: String, policy: GroupPolicy },
    /// Removes a group without resources and without owner.
    GroupRemove { name: String },
    /// Wants a group online; forgets failures.
    GroupOnline { name: String },
    /// Takes a group offline and keeps it there.
    GroupOffline { name: String, reason: String },
    /// Leaves a group alone, or looks after it again.
    GroupMaintenance { name: String, on: bool },
    /// The manager: gives a group without owner, or whose owner does not stand any more, to a node under the next generation.
    GroupAssign { name: String, from_generation: u64, to: NodeId, reason: String },
    /// The owner: how the group (`None`: as before) and its resources are. A resource that is not named is as before.
    GroupStatus {
        name: String,
        generation: u64,
        node: NodeId,
        state: Option<GroupState>,
        resources: BTreeMap<String, ResourceStatus>,
    },
    /// Have the owner give the group away. `to: None`: it goes offline.
    GroupRelease {
        name: String,
        generation: u64,
        to: Option<NodeId>,
        how: MoveKind,
        reason: String,
        cause: MoveCause,
    },
    /// The owner: nothing of the group runs there any more.
    GroupReleased { name: String, generation: u64, node: NodeId },
    /// The owner: the group runs on the node to which it was to go, and not here any more.
    GroupMigrated { name: String, generation: u64, node: NodeId },
    /// The owner: the group stays, and is as before.
    GroupReleaseCancelled { name: String, generation: u64, node: NodeId, reason: String },
    /// The manager: the owner is gone and no node can take it.
    GroupUnplaced { name: String, from_generation: u64, reason: String },
    /// The manager: it is not moved again for failure; it stays where it is, failed.
    GroupGiveUp { name: String, generation: u64, reason: String },

    /// A new resource in a group.
    ResourceAdd { resource: NewResource },
    /// Changes a resource; what is `None` stays. With `properties`, `None` removes one.
    ResourceSet { name: String, change: ResourceChange },
    /// Removes a resource that is offline and that no other depends on.
    ResourceRemove { name: String },
    /// Wants a resource online when its group is; forgets failures.
    ResourceOnline { name: String },
    /// Takes a resource offline and keeps it there.
    ResourceOffline { name: String },
    /// A resource type in a shared library.
    TypePut { resource_type: LibraryType },
    /// Forgets a resource type that no resource has.
    TypeRemove { name: String },
}

/// What [`Command::ResourceAdd`] needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewResource {
    /// Name, unique in the cluster; no brackets or parentheses.
    pub name: String,
    /// Type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Group, which must be there.
    pub group: String,
    /// Properties, checked against the type before.
    pub properties: BTreeMap<String, String>,
    /// Dependency expression.
    pub depends: String,
    /// Nodes that may have it; empty: all.
    pub possible: Vec<NodeId>,
    /// Failure and polls.
    pub policy: ResourcePolicy,
    /// Files that follow it.
    pub checkpoints: Vec<String>,
    /// Should it be online when its group is?
    pub want_online: bool,
}

/// What [`Command::ResourceSet`] changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceChange {
    /// Properties to set, or to remove.
    pub properties: BTreeMap<String, Option<String>>,
    /// Dependency expression.
    pub depends: Option<String>,
    /// Nodes that may have it.
    pub possible: Option<Vec<NodeId>>,
    /// Failure and polls.
    pub policy: Option<ResourcePolicy>,
    /// Files that follow it.
    pub checkpoints: Option<Vec<String>>,
    /// Another group; the resource must be offline.
    pub group: Option<String>,
}

/// Events in one `EventAdd`.
pub const EVENTS_PER_COMMAND_MAX: usize = 64;

impl Command {
    /// Feature level from which on the cluster takes it. Commands added later return theirs here.
    #[must_use]
    #[allow(clippy::wildcard_enum_match_arm, reason = "all others were there from the beginning")]
    pub fn min_level(&self) -> u32 {
        match self {
            Command::GroupAdd { .. }
            | Command::GroupPolicy { .. }
            | Command::GroupRemove { .. }
            | Command::GroupOnline { .. }
            | Command::GroupOffline { .. }
            | Command::GroupMaintenance { .. }
            | Command::GroupAssign { .. }
            | Command::GroupStatus { .. }
            | Command::GroupRelease { .. }
            | Command::GroupReleased { .. }
            | Command::GroupMigrated { .. }
            | Command::GroupReleaseCancelled { .. }
            | Command::GroupUnplaced { .. }
            | Command::GroupGiveUp { .. }
            | Command::ResourceAdd { .. }
            | Command::ResourceSet { .. }
            | Command::ResourceRemove { .. }
            | Command::ResourceOnline { .. }
            | Command::ResourceOffline { .. }
            | Command::TypePut { .. }
            | Command::TypeRemove { .. } => 2,
            _ => 1,
        }
    }

    /// In an envelope.
    #[must_use]
    pub fn by(self, by: NodeId, at_unix_ms: u64) -> Envelope {
        Envelope { at_unix_ms, by, command: self }
    }
}

impl AdminState {
    /// What `NodePause` makes.
    #[must_use]
    pub fn paused(drain: bool) -> AdminState {
        if drain { AdminState::Draining } else { AdminState::Paused }
    }
}
