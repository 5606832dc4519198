//! Groups: resources that are on one node together and move together.
//!
//! ```text
//!              assign                       status                        release(to)              released
//!   Offline ------------> Pending -----------------------> Online, ... -----------------> Releasing ----------> Pending (at `to`)
//!      ^                                Partial, Failed <-> Online          |  cancelled: as before     or Offline
//!      └──────────── unplaced (the owner is gone and nobody can take it), released to nobody
//! ```
//!
//! Invariants
//! * At most one owner per generation, and the generation grows with every new owner: what a former owner says is refused.
//! * The next owner is named only when the last has released the group, or does not stand any more (down, begun anew).
//! * A group has an owner exactly in the states Pending, Online, Partial, Failed and Releasing.
//!
//! What a crash leaves behind: the owner's node goes down, and the manager names another one.

use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Start priority: groups of higher priority start first; 0 is not started by itself.
pub const PRIORITY_DEFAULT: u32 = 2000;
/// Highest priority.
pub const PRIORITY_MAX: u32 = 10_000;
/// Failures on record per group.
pub const GROUP_FAILURES_MAX: usize = 64;

/// How a group is, by the word of its owner or of the manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupState {
    /// No node has it.
    Offline { reason: String },
    /// Its owner brings it online (or, when it is not wanted online any more, is about to take it offline).
    Pending,
    /// Everything that is wanted online is.
    Online,
    /// Some resource is not online, and the group is used all the same.
    Partial { reason: String },
    /// It does not come online, or did not stay so, on its owner, and the owner has given up for now.
    Failed { reason: String },
    /// Its owner gives it away.
    Releasing {
        /// To whom; `None`: it goes offline.
        to: Option<NodeId>,
        /// How virtual machines go.
        how: MoveKind,
        /// Why, for people.
        reason: String,
        /// Why, for the rules.
        cause: MoveCause,
    },
}

/// Why a group is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveCause {
    /// An administrator wants it there: that is its place from now on.
    Order,
    /// It failed. Counts towards the failover threshold.
    Failure,
    /// Its node is drained or about to stop.
    Drain,
    /// It goes back to its most preferred owner.
    Failback,
    /// It goes to a node that is less busy.
    Balance,
    /// It is not wanted online any more, or must not be where it is.
    Rule,
}

impl MoveCause {
    /// Is the group at its own place after such a move? From another place it goes back by failback.
    #[must_use]
    pub fn settles(self) -> bool {
        match self {
            MoveCause::Order | MoveCause::Failback | MoveCause::Balance => true,
            MoveCause::Failure | MoveCause::Drain | MoveCause::Rule => false,
        }
    }
}

impl GroupState {
    /// Has a group in this state an owner?
    #[must_use]
    pub fn owned(&self) -> bool {
        !matches!(self, GroupState::Offline { .. })
    }
}

impl fmt::Display for GroupState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GroupState::Offline { .. } => "offline",
            GroupState::Pending => "pending",
            GroupState::Online => "online",
            GroupState::Partial { .. } => "partially online",
            GroupState::Failed { .. } => "failed",
            GroupState::Releasing { .. } => "moving",
        })
    }
}

/// How a group's virtual machines go to another node. Everything else is taken offline here and online there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveKind {
    /// Running: memory is copied while the guest works.
    #[default]
    Live,
    /// Saved to the volume, resumed there.
    Quick,
    /// Shut down, started there.
    Shutdown,
}

impl fmt::Display for MoveKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MoveKind::Live => "live",
            MoveKind::Quick => "quick",
            MoveKind::Shutdown => "shutdown",
        })
    }
}

/// When a group goes back to its most preferred owner after it had to leave it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failback {
    /// Never by itself.
    #[default]
    Never,
    /// As soon as that node has been up for `settle_ms`.
    AtOnce,
    /// Only in this part of the day, by the leader's clock on the wall. Minutes since midnight, 0 to 1439; `from` is in it,
    /// `to` is not; `from` > `to` goes over midnight.
    Window { from_minute: u16, to_minute: u16 },
}

/// Groups of one class keep away from each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AntiAffinity {
    /// Name of the class.
    pub class: String,
    /// Rather offline than together on one node. Soft: together only when there is no other node.
    pub hard: bool,
}

/// What an administrator decides about a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupPolicy {
    /// Owners by preference; others may own it too.
    pub preferred: Vec<NodeId>,
    /// After a start of the whole cluster it goes to the node where it was last.
    pub persistent: bool,
    /// Start priority, 0 to [`PRIORITY_MAX`]; 3000 is high, 2000 medium, 1000 low; 0: it does not start by itself after it lost
    /// its node.
    pub priority: u32,
    /// Groups that are online (or not wanted online) before this one starts.
    pub start_after: Vec<String>,
    /// Failovers for failure within `failover_period_ms`; the next failure leaves the group failed. `None`: one less than
    /// there are nodes.
    pub failover_threshold: Option<u32>,
    /// In milliseconds.
    pub failover_period_ms: u64,
    /// Going back.
    pub failback: Failback,
    /// What it keeps away from.
    pub anti_affinity: Vec<AntiAffinity>,
    /// How its virtual machines leave a node that is drained, and go by failback and balancing.
    pub move_kind: MoveKind,
}

impl Default for GroupPolicy {
    fn default() -> Self {
        GroupPolicy {
            preferred: Vec::new(),
            persistent: true,
            priority: PRIORITY_DEFAULT,
            start_after: Vec::new(),
            failover_threshold: None,
            failover_period_ms: 6 * 3_600_000,
            failback: Failback::Never,
            anti_affinity: Vec::new(),
            move_kind: MoveKind::Live,
        }
    }
}

/// The group did not work on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupFailure {
    /// Where.
    pub node: NodeId,
    /// When (Unix ms).
    pub at_unix_ms: u64,
    /// Why, for people.
    pub why: String,
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Name.
    pub name: String,
    /// What the administrator decided.
    #[serde(default)]
    pub policy: GroupPolicy,
    /// Should it be online?
    pub want_online: bool,
    /// In maintenance it is left alone: no polls, no restarts, no failover for failure, no balancing.
    #[serde(default)]
    pub maintenance: bool,
    /// Node that has it.
    pub owner: Option<NodeId>,
    /// Incarnation of the owner for which it was chosen.
    #[serde(default)]
    pub incarnation: u64,
    /// Number of the ownership; grows with every owner.
    pub generation: u64,
    /// How it is.
    pub state: GroupState,
    /// When the state began (Unix ms).
    pub since_unix_ms: u64,
    /// When it got its owner (Unix ms).
    #[serde(default)]
    pub placed_unix_ms: u64,
    /// When it was ordered to start (Unix ms), until it has an owner: by an administrator, or by a move whose target was
    /// gone. Without, a group of priority 0 that lost its node stays offline.
    #[serde(default)]
    pub ordered_unix_ms: Option<u64>,
    /// Who had it last.
    #[serde(default)]
    pub last_owner: Option<NodeId>,
    /// The engine chose its place, for want of a better one: it goes back to its most preferred owner, if its policy says so.
    /// Not so after an administrator moved it.
    #[serde(default)]
    pub displaced: bool,
    /// Failovers for failure (Unix ms), oldest first, at most [`GROUP_FAILURES_MAX`].
    #[serde(default)]
    pub failovers: Vec<u64>,
    /// Where it failed since it was last online, oldest first, at most [`GROUP_FAILURES_MAX`].
    #[serde(default)]
    pub failures: Vec<GroupFailure>,
    /// Why it is not moved any more although it failed, if so.
    #[serde(default)]
    pub given_up: Option<String>,
}

impl Group {
    /// A new one, without owner.
    #[must_use]
    pub fn new(name: &str, policy: GroupPolicy, at_unix_ms: u64) -> Group {
        Group {
            name: name.into(),
            policy,
            want_online: false,
            maintenance: false,
            owner: None,
            incarnation: 0,
            generation: 0,
            state: GroupState::Offline { reason: "it is new".into() },
            since_unix_ms: at_unix_ms,
            placed_unix_ms: at_unix_ms,
            ordered_unix_ms: None,
            last_owner: None,
            displaced: false,
            failovers: Vec::new(),
            failures: Vec::new(),
            given_up: None,
        }
    }

    /// The node that has it or is about to get it.
    #[must_use]
    pub fn home(&self) -> Option<NodeId> {
        match &self.state {
            GroupState::Releasing { to, .. } => *to,
            GroupState::Pending
            | GroupState::Online
            | GroupState::Partial { .. }
            | GroupState::Failed { .. } => self.owner,
            GroupState::Offline { .. } => None,
        }
    }

    /// Place of a node among the preferred owners; all others come behind.
    #[must_use]
    pub fn rank(&self, node: NodeId) -> usize {
        let preferred = &self.policy.preferred;
        preferred.iter().position(|preferred| *preferred == node).unwrap_or(preferred.len())
    }
}
