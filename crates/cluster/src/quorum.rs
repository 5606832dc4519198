//! Who votes, and whether a partition may go on.
//!
//! Node majority over the **voters**, which are Raft's voters. `target_voters` moves the set of voters, one voter at a
//! time, to what it should be:
//! * static quorum: every node with a configured vote that was up once; the witness when their number is even;
//! * dynamic quorum: those of them that are up; the witness when it can be reached and their number is even; when it is even and
//!   there is no witness, one node gives up its vote (of the present voters none if that makes it odd, else the highest number),
//!   so that a cut through the middle always leaves a side that goes on.
//!
//! The last voter never goes (last man standing). A node that is about to stop (`leaving`) hands its vote over while it still runs.
//!
//! **Why no two disjoint majorities can arise.** A new set differs from the old one by one voter. For sets of n and n + 1 voters,
//! the smallest majorities have ⌊n/2⌋ + 1 and ⌊(n+1)/2⌋ + 1 members, together n + 2, and both lie in n + 1 voters: they share one. Raft
//! commits the change by a majority of both sets, and proposes the next one only after that. So a partition that could
//! still win the old set hears of the new one or loses. The step is only proposed when the voters that are up make a majority
//! of the old set (otherwise it could not be committed) and of the new one (otherwise the cluster would stop by its own doing).
//!
//! What dynamic quorum cannot do: with an even number of nodes and no witness the one without a vote cannot go on alone; two nodes
//! without a witness survive the loss of only one of them.

use crate::db::{ClusterDb, NodeState, Witness};
use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

#[cfg(test)]
mod tests;

/// A Raft voter: a node's number, or the witness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VoterId(pub u64);

impl VoterId {
    /// The witness, of either kind. Above every node number.
    pub const WITNESS: VoterId = VoterId(1000);

    /// The node, unless it is the witness.
    #[must_use]
    pub fn node(self) -> Option<NodeId> {
        if self == VoterId::WITNESS { None } else { u32::try_from(self.0).ok().map(NodeId) }
    }
}

impl From<NodeId> for VoterId {
    fn from(node: NodeId) -> Self {
        VoterId(u64::from(node.0))
    }
}

impl fmt::Display for VoterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.node() {
            Some(node) => node.fmt(f),
            None => f.write_str("witness"),
        }
    }
}

/// Who should vote next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The voters: the present ones, or those with one more or one fewer.
    pub voters: BTreeSet<VoterId>,
    /// Why they change, or why they do not.
    pub reason: String,
}

/// Votes needed of that many voters.
#[must_use]
pub fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// Do the live ones make a majority of the voters?
#[must_use]
pub fn has_quorum(voters: &BTreeSet<VoterId>, live: &BTreeSet<VoterId>) -> bool {
    voters.intersection(live).count() >= majority(voters.len())
}

/// How many of the live voters may fail at once without the others losing quorum; `None` without quorum.
#[must_use]
pub fn tolerates(voters: &BTreeSet<VoterId>, live: &BTreeSet<VoterId>) -> Option<usize> {
    voters.intersection(live).count().checked_sub(majority(voters.len()))
}

/// The next voters, at most one step from `current`. `up`: nodes that the leader hears, itself included.
///
/// Idempotent: with `current` at its goal it answers `current`.
#[must_use]
pub fn target_voters(
    db: &ClusterDb,
    up: &BTreeSet<NodeId>,
    current: &BTreeSet<VoterId>,
    witness_up: bool,
) -> Decision {
    let mut live: BTreeSet<VoterId> = up.iter().copied().map(VoterId::from).collect();
    if witness_up {
        live.insert(VoterId::WITNESS);
    }
    let goal = goal(db, up, current, witness_up);
    let keep = |reason: &str| Decision { voters: current.clone(), reason: reason.into() };
    if goal == *current {
        return keep("the voters are as they should be");
    }
    if !has_quorum(current, &live) {
        return keep("the present voters have no majority: nothing can be changed");
    }
    let joins = goal.difference(current).map(|&voter| (voter, true));
    let leaves = current.difference(&goal).map(|&voter| (voter, false));
    let steps = joins.chain(leaves).filter_map(|(voter, joins)| {
        let mut voters = current.clone();
        if joins {
            voters.insert(voter);
        } else {
            voters.remove(&voter);
        }
        let margin = tolerates(&voters, &live).filter(|_| !voters.is_empty())?;
        // The safest set first; then go the dead, then a witness that is not wanted any more, which may stop any moment;
        // then newcomers come.
        let unwanted = voter == VoterId::WITNESS && db.quorum.witness == Witness::None;
        let order = (!joins && !live.contains(&voter), !joins && unwanted, joins);
        Some(((margin, order), voter, joins, voters))
    });
    // `max_by_key` takes the last of equals; the lowest number is wanted.
    let best = steps.max_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    let Some((_, voter, joins, voters)) = best else {
        return keep("every change would cost the majority");
    };
    Decision { voters, reason: reason(db, voter, joins, live.contains(&voter)) }
}

fn reason(db: &ClusterDb, voter: VoterId, joins: bool, live: bool) -> String {
    let name = voter.node().map_or_else(|| "the witness".to_owned(), |node| db.node_name(node));
    let known = voter.node().is_none_or(|node| db.nodes.contains_key(&node));
    if joins {
        format!("{name} gets a vote")
    } else if !known {
        format!("{name} loses its vote: it is no node of the cluster any more")
    } else if live {
        format!("{name} gives up its vote, so that the number of votes is odd or because it is to have none")
    } else {
        format!("{name} loses its vote: it is not heard")
    }
}

fn goal(
    db: &ClusterDb,
    up: &BTreeSet<NodeId>,
    current: &BTreeSet<VoterId>,
    witness_up: bool,
) -> BTreeSet<VoterId> {
    let dynamic = db.quorum.dynamic;
    let votes = |node: NodeId| {
        let Some(node) = db.nodes.get(&node).filter(|node| node.vote && !node.leaving) else { return false };
        // A newcomer, or one kept out, must be let in first; a node that is down keeps its vote only in a static quorum.
        let heard = up.contains(&node.id) && matches!(node.state, NodeState::Up | NodeState::Isolated);
        heard || (!dynamic && current.contains(&VoterId::from(node.id)))
    };
    let mut goal: BTreeSet<VoterId> =
        db.nodes.keys().copied().filter(|&node| votes(node)).map(VoterId::from).collect();
    if goal.is_empty() {
        return current.clone();
    }
    let witness = db.quorum.witness != Witness::None && (witness_up || !dynamic);
    if goal.len().is_multiple_of(2) {
        if witness {
            goal.insert(VoterId::WITNESS);
        } else if dynamic {
            give_one_up(&mut goal, current);
        }
    }
    goal
}

/// Makes an even number odd. A set that is so already stays, so that no vote moves without need.
fn give_one_up(goal: &mut BTreeSet<VoterId>, current: &BTreeSet<VoterId>) {
    let without: Vec<VoterId> = goal.difference(current).copied().collect();
    let one = if let [only] = without[..] { Some(only) } else { goal.last().copied() };
    if let Some(one) = one {
        goal.remove(&one);
    }
}
