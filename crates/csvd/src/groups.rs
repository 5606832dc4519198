//! What csvd tells of groups and resources beside the database: the answers that `csvctl group`, `resource` and `vm` print.
//! `ClusterRequest::BalanceDryRun` is answered with [`csv_cluster::groups::balance::Balance`].

use csv_resource::api::TypeInfo;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Answer to `ClusterRequest::ResourceTypes`.
pub type Types = Vec<TypeInfo>;

/// Answer to `ClusterRequest::GroupsWaiting`: groups that are wanted online and have no owner yet, with what each waits for.
pub type Waiting = BTreeMap<String, String>;

/// A row of the answer to `ClusterRequest::Candidates`, best first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Name of the node.
    pub node: String,
    /// Could it have the group?
    pub fit: bool,
    /// What speaks for its place, or which rule stops it.
    pub why: String,
}

/// Answer to `ClusterRequest::MoveProgress`; `None` when nothing of the group moves while it runs.
pub type Moving = Option<MoveProgress>;

/// How far a move has come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveProgress {
    /// Resource that moves now.
    pub resource: String,
    /// What is being done, in words.
    pub text: String,
    /// Of the guest's memory, 0 to 100; `None` while that cannot be said.
    pub percent: Option<u8>,
}
