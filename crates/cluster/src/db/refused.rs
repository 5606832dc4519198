//! Why a command was not taken. A refused command changed nothing; the text says what is wrong and what to do next.

use super::settings::SettingError;
use serde::{Deserialize, Serialize};

/// Why a command was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Refused {
    /// No cluster yet.
    #[error("there is no cluster on this node yet: run `csvctl cluster create` or `csvctl cluster join`")]
    NoCluster,
    /// `Init` on a database in use.
    #[error("this node belongs to cluster {cluster} already: run `csvctl cluster leave` first")]
    ClusterExists { cluster: String },
    /// The cluster's level is lower than the command's.
    #[error(
        "this needs feature level {needed}, the cluster is at {level}: update csvd on every node, then run `csvctl cluster update-level`"
    )]
    FeatureLevel { needed: u32, level: u32 },
    /// A node's software is too old.
    #[error(
        "wrong version: csvd on {node} knows feature level {has}, the cluster is at {level}; install a csvd on {node} that is as new as the others'"
    )]
    WrongVersion { node: String, has: u32, level: u32 },
    /// A level that not every node knows, or not above the present one.
    #[error("the feature level cannot be raised to {to}: {why}")]
    CannotRaise { to: u32, why: String },
    /// No such thing.
    #[error("there is no {what} {name}")]
    NotFound { what: String, name: String },
    /// A name or address that is taken.
    #[error("{what} {name} exists already in the cluster{hint}")]
    Duplicate { what: String, name: String, hint: String },
    /// Cannot be a name.
    #[error("{what} name \"{name}\" cannot be used: {why}")]
    BadName { what: String, name: String, why: String },
    /// A bad argument.
    #[error("{0}")]
    Invalid(String),
    /// A bound is reached.
    #[error("no more than {max} {what} are possible; remove one first")]
    TooMany { what: String, max: u64 },
    /// The join token is not good.
    #[error("the join token is {why}: make a new one on a node of the cluster with `csvctl cluster token`")]
    Token { why: String },
    /// Somebody else got the number first.
    #[error("the node would become number {next}, its certificate was made for {expected}: try again")]
    OtherNodeId { next: u32, expected: u32 },
    /// About an incarnation that is not the node's.
    #[error(
        "stale: this is about incarnation {got} of {node}, which is at {current}; the node must start anew to come back"
    )]
    StaleIncarnation { node: String, got: u64, current: u64 },
    /// Kept out.
    #[error(
        "{node} is quarantined for another {left_s} s after {failures} failures; find out why it fails, then run `csvctl node clear-quarantine {node}` to let it in at once"
    )]
    Quarantined { node: String, left_s: u64, failures: u64 },
    /// The node's state does not allow it.
    #[error("{node} is {state}: {why}")]
    NodeState { node: String, state: String, why: String },
    /// The last node cannot go.
    #[error("{node} is the cluster's last node: run `csvctl cluster destroy` to end the cluster")]
    LastNode { node: String },
    /// The node owns volumes.
    #[error("{node} owns {volumes}: move them first with `csvctl node drain {node}`")]
    OwnsVolumes { node: String, volumes: String },
    /// About an epoch that is not the volume's.
    #[error("stale: this is about epoch {got} of volume {volume}, which is at {current}")]
    StaleEpoch { volume: String, got: u64, current: u64 },
    /// About a generation that is not the member's.
    #[error("stale: this is about generation {got} of {node} on volume {volume}, which is at {current}")]
    StaleGeneration { volume: String, node: String, got: u32, current: u32 },
    /// Somebody who is not the owner speaks as the owner.
    #[error("{node} does not own volume {volume}: {owner} does")]
    NotOwner { volume: String, node: String, owner: String },
    /// The volume's state does not allow it.
    #[error("volume {volume} is {state}: {why}")]
    VolumeState { volume: String, state: String, why: String },
    /// About a generation that is not the group's.
    #[error("stale: this is about generation {got} of group {group}, which is at {current}")]
    StaleGroup { group: String, got: u64, current: u64 },
    /// Somebody who is not the owner speaks as the owner.
    #[error("{node} does not own group {group}: {owner} does")]
    NotGroupOwner { group: String, node: String, owner: String },
    /// The group's state does not allow it.
    #[error("group {group} is {state}: {why}")]
    GroupState { group: String, state: String, why: String },
    /// The node owns groups.
    #[error("{node} has the groups {groups}: move them first with `csvctl node drain {node}`")]
    OwnsGroups { node: String, groups: String },
    /// A key must go first.
    #[error(
        "{node} (generation {generation}) is still to be fenced from volume {volume}: the owner must preempt its key first"
    )]
    FencePending { volume: String, node: String, generation: u32 },
    /// A setting was not taken.
    #[error(transparent)]
    Setting(#[from] SettingError),
}
