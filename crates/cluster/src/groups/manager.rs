//! Manager of groups: which node has which group. A pure function from the database and what the nodes report to commands; csvd
//! of the Raft leader calls it every 200 ms and proposes what it returns.
//!
//! Idempotent: with the same view, planning after its commands were applied gives nothing (but that a group which is moved while
//! it starts keeps those of lower priority waiting no longer, so one more plan may follow). Late or doubled proposals are
//! harmless, since each command carries the generation that it was decided on.
//!
//! Rules, in this order; a group that one of them touches is left alone by those that come after
//! 1. What is not wanted online is released to nobody; if its owner is gone, it has none any more.
//! 2. What is wanted online and has no owner, or one that does not stand any more (down, started anew), gets one
//!    (`starts`): by priority and start order, a few at a time on each node, after the former owner has stopped for certain.
//! 3. What its owner has given up on goes to another node, at most so often as its policy allows (`moves::failures`).
//! 4. What is on a node that is drained or about to stop moves away (`moves::drain`).
//! 5. What is where a hard rule does not allow it any more moves away (`moves::hard_rules`).
//! 6. What had to leave its preferred owner goes back when its policy says so (`moves::failback`).
//! 7. Virtual machines leave nodes that are too busy, when all is quiet ([`super::balance`]).
//!
//! **When has a former owner stopped for certain?** At once, when it is there again (it takes a new incarnation only when all
//! its groups have ended) or said goodbye; otherwise when it was not heard for as long as a node that is cut off goes on at most
//! ([`ClusterDb::may_run_for_ms`]). Groups whose every resource guards itself (see [`Guard`]) or needs a disk do not wait. A
//! group loses its owner only then, so one without an owner is nowhere.
//!
//! A group in maintenance is not moved for failure, by hard rules, failback and balancing; it is for an administrator, a drain
//! and the loss of its node. A group that is moved, and whose owner stands, is never touched; when its target dies, its owner
//! goes on, and the release leaves it without an owner for the next plan.

mod moves;
mod starts;
#[cfg(test)]
mod tests;

use super::balance;
use super::candidates::Planner;
use super::expr::Expr;
#[cfg(doc)]
use crate::db::Settings;
use crate::db::{
    ClusterDb, Command, Group, GroupState, Guard, MoveCause, MoveKind, Node, NodeState, Resource,
};
use crate::failover::NodeReport;
use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Feature level from which on there are groups.
const LEVEL: u32 = 2;

/// What the manager sees besides the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupView {
    /// Wall clock of the planning node (Unix ms).
    pub now_unix_ms: u64,
    /// Its local time minus UTC, in minutes; for failback windows.
    pub utc_offset_min: i32,
    /// The planning node.
    pub me: NodeId,
    /// The newest report of each node that is heard.
    pub reports: BTreeMap<NodeId, NodeReport>,
}

/// What to do now. See the module's text.
#[must_use]
pub fn plan(db: &ClusterDb, view: &GroupView) -> Vec<Command> {
    if !db.initialised() || db.feature_level < LEVEL || db.groups.is_empty() {
        return Vec::new();
    }
    let mut planner = Planner::new(db, view);
    for group in db.groups.values().filter(|group| !group.want_online) {
        take_offline(&mut planner, group);
    }
    starts::start(&mut planner);
    moves::failures(&mut planner);
    moves::drain(&mut planner);
    moves::hard_rules(&mut planner);
    moves::failback(&mut planner);
    balance::when_due(&mut planner);
    starts::say_homeless(&mut planner);
    planner.commands
}

/// Groups that are wanted online, have no owner and do not get one yet, each with what it waits for. Those that no node can
/// take are not among them: their state says why.
#[must_use]
pub fn waiting(db: &ClusterDb, view: &GroupView) -> BTreeMap<String, String> {
    let mut planner = Planner::new(db, view);
    starts::start(&mut planner);
    planner.waiting.into_iter().map(|(group, why)| (group.to_owned(), why)).collect()
}

/// The owner of a group that nobody wants online any more releases it, or is gone.
fn take_offline<'a>(planner: &mut Planner<'a>, group: &'a Group) {
    if group.owner.is_none() {
        return;
    }
    if planner.db.group_owner_stands(group) {
        if !matches!(group.state, GroupState::Releasing { .. }) {
            let how = (MoveKind::Shutdown, MoveCause::Rule);
            planner.release(group, None, how, "it is to be offline".into());
        }
    } else if planner.has_stopped(group) {
        planner.unplaced(group, "it is to be offline, and its owner is gone".into());
    }
}

impl<'a> Planner<'a> {
    /// The group's owner, if it is up and can be asked to give it away.
    pub(super) fn movable(&self, group: &Group) -> Option<&'a Node> {
        let asked = group.want_online
            && !matches!(group.state, GroupState::Releasing { .. })
            && !self.touched.contains(group.name.as_str())
            && self.db.group_owner_stands(group);
        group.owner.filter(|_| asked).and_then(|owner| self.db.nodes.get(&owner)).filter(|node| node.is_up())
    }

    /// May one more planned move begin?
    pub(super) fn room_to_move(&self) -> bool {
        self.moving < usize::try_from(self.db.settings.max_parallel_moves).unwrap_or(usize::MAX)
    }

    /// May a group whose owner does not stand, or that has none, be started elsewhere?
    fn has_stopped(&self, group: &Group) -> bool {
        let Some(last) = group.owner.or(group.last_owner).and_then(|last| self.db.nodes.get(&last)) else {
            // It was removed, which it was only when it was down or had nothing any more.
            return true;
        };
        // One without an owner was released, unless it lost its owner together with the node (a start by force).
        let released = group.owner.is_none() && group.since_unix_ms != last.since_unix_ms;
        let renewed = group.owner.is_some() && last.incarnation != group.incarnation;
        match last.state {
            NodeState::Up | NodeState::Isolated | NodeState::Joining => true,
            NodeState::Down => {
                let may_run_ms = self.db.may_run_for_ms(last, self.view.me, self.view.now_unix_ms);
                released || renewed || may_run_ms == 0 || self.guarded(group)
            }
        }
    }

    /// Does every resource of the group guard itself, or need a disk?
    fn guarded(&self, group: &Group) -> bool {
        let by_name: BTreeMap<&str, &Resource> =
            self.resources(&group.name).iter().map(|resource| (resource.name.as_str(), *resource)).collect();
        let disks = with_disk(&by_name);
        by_name
            .values()
            .all(|resource| resource.guard() == Guard::Own || disks.contains(resource.name.as_str()))
    }
}

/// The disks, and what cannot be online without one.
fn with_disk<'a>(resources: &BTreeMap<&'a str, &Resource>) -> BTreeSet<&'a str> {
    let is_disk = |resource: &&Resource| resource.kind == "PhysicalDisk";
    let mut disks: BTreeSet<&str> =
        resources.iter().filter(|(_, resource)| is_disk(resource)).map(|(name, _)| *name).collect();
    if disks.is_empty() {
        return disks;
    }
    let parsed: Vec<(&str, Expr)> = resources
        .iter()
        .map(|(name, resource)| (*name, Expr::parse(&resource.depends).unwrap_or(Expr::Nothing)))
        .collect();
    // As many rounds as a chain is long, at most.
    loop {
        let more: Vec<&str> = parsed
            .iter()
            .filter(|(name, depends)| !disks.contains(name) && needs_one_of(depends, &disks))
            .map(|(name, _)| *name)
            .collect();
        if more.is_empty() {
            return disks;
        }
        disks.extend(more);
    }
}

fn needs_one_of(expr: &Expr, names: &BTreeSet<&str>) -> bool {
    match expr {
        Expr::Nothing => false,
        Expr::Resource(name) => names.contains(name.as_str()),
        Expr::All(parts) => parts.iter().any(|part| needs_one_of(part, names)),
        Expr::Any(parts) => parts.iter().all(|part| needs_one_of(part, names)),
    }
}
