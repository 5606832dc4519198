//! Which nodes can have a group, and which of them best. Every "no" names the rule that says it, in words without numbers that
//! change by themselves, so that the same "no" is said only once.
//!
//! Order of those that can: where the group did not fail lately, preferred owners by rank, for a start the last owner if the group
//! is persistent, away from groups of its (soft) classes, least promised memory, least promised processors, fewest groups, lowest
//! number.
//!
//! What is promised to a node: memory and processors of the virtual machines that are wanted online in the groups which have it
//! for their home. A group that moves is promised to the node that it goes to. For the limits, anti-affinity and memory, it is on
//! both until its owner has released it, and one that is taken offline is still where it is.

use super::manager::GroupView;
use crate::db::{
    AdminState, ClusterDb, Command, Group, GroupState, MoveCause, MoveKind, Node, NodeState, Resource,
};
use crate::failover::NodeReport;
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Can each node have the group? Nodes in order of their numbers; a "no" is a sentence about the node. A group that is not in
/// the database can go nowhere: the list is empty.
#[must_use]
pub fn verdicts(db: &ClusterDb, view: &GroupView, group: &str) -> Vec<(NodeId, Result<(), String>)> {
    let Some(group) = db.groups.get(group) else { return Vec::new() };
    let planner = Planner::new(db, view);
    let verdict = |node: &Node| planner.fit(group, node).map_err(|unfit| unfit.about(node));
    db.nodes.values().map(|node| (node.id, verdict(node))).collect()
}

/// The nodes that can have the group, best first, each with what speaks for its place, then the others with what rules them out.
#[must_use]
pub fn explain(db: &ClusterDb, view: &GroupView, group: &str) -> Vec<(NodeId, String)> {
    let Some(group) = db.groups.get(group) else { return Vec::new() };
    let planner = Planner::new(db, view);
    let (mut fit, mut unfit) = (Vec::new(), Vec::new());
    for node in db.nodes.values() {
        match planner.fit(group, node) {
            Ok(()) => fit.push((planner.key(group, node.id), node)),
            Err(why) => unfit.push((node.id, why.about(node))),
        }
    }
    fit.sort_by_key(|(key, _)| *key);
    let ranked = fit.iter().map(|(key, node)| (node.id, key.describe(group)));
    ranked.chain(unfit).collect()
}

/// Why there is no candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Blocked {
    /// A node that is up has not reported yet.
    Wait,
    /// What keeps each node from it.
    NoNode(String),
}

/// Why a node cannot have a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unfit<'a> {
    /// It has not reported in its present incarnation.
    Silent,
    /// Its own state.
    State(&'static str),
    /// A resource may not be there.
    NotPossible(&'a str),
    /// Another group is there.
    Together { group: &'a str, class: &'a str },
    /// Its virtual machines do not fit.
    Memory { left_mib: u64, group: &'a str, needs_mib: u64 },
}

impl Unfit<'_> {
    pub(super) fn about(&self, node: &Node) -> String {
        let name = &node.name;
        match self {
            Unfit::Silent => format!("{name} does not report"),
            Unfit::State(is) => format!("{name} {is}"),
            Unfit::NotPossible(resource) => format!("{name} is no possible owner of resource {resource}"),
            Unfit::Together { group, class } => {
                format!("{name} has group {group} of the same class '{class}' (hard anti-affinity)")
            }
            Unfit::Memory { left_mib, group, needs_mib } => {
                format!("{name} has {left_mib} MiB left for virtual machines, {group} needs {needs_mib}")
            }
        }
    }
}

/// Place in the order of candidates; the least is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    failed_there: bool,
    rank: usize,
    not_last: bool,
    company: usize,
    memory_permille: u64,
    cpu_permille: u64,
    groups: usize,
    node: NodeId,
}

impl Key {
    /// The part that policy and history alone decide.
    pub(super) fn wish(&self) -> (bool, usize, bool) {
        (self.failed_there, self.rank, self.not_last)
    }

    pub(super) fn node(&self) -> NodeId {
        self.node
    }

    fn describe(&self, group: &Group) -> String {
        let mut words = Vec::new();
        if self.failed_there {
            words.push("it failed there".to_owned());
        }
        if self.rank < group.policy.preferred.len() {
            words.push(format!("preferred owner {}", self.rank + 1));
        }
        if !self.not_last {
            words.push("it was there last".into());
        }
        if self.company > 0 {
            words.push(format!("groups of its classes there: {}", self.company));
        }
        words.push(format!(
            "promised with it: memory {} %, processors {} %; other groups: {}",
            self.memory_permille / 10,
            self.cpu_permille / 10,
            self.groups
        ));
        words.join(", ")
    }
}

/// What a node has promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Promised {
    pub(super) memory_mib: u64,
    /// With what is leaving it and has not left yet.
    held_mib: u64,
    pub(super) cpus: u64,
    pub(super) groups: usize,
    /// Groups that are coming online there.
    pub(super) pending: usize,
}

/// The plan while it is being made.
pub(super) struct Planner<'a> {
    pub(super) db: &'a ClusterDb,
    pub(super) view: &'a GroupView,
    pub(super) commands: Vec<Command>,
    /// Groups that this plan touches.
    pub(super) touched: BTreeSet<&'a str>,
    /// Moves under way, with those of this plan.
    pub(super) moving: usize,
    /// Groups that could start and do not yet, with the reason.
    pub(super) waiting: BTreeMap<&'a str, String>,
    /// Groups that no node can take.
    pub(super) homeless: Vec<&'a Group>,
    resources: BTreeMap<&'a str, Vec<&'a Resource>>,
    promised: BTreeMap<NodeId, Promised>,
    /// Groups of each class, by the node that they are on or go to, and whether they want to be alone by all means.
    classes: BTreeMap<(&'a str, NodeId), BTreeMap<&'a str, bool>>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(db: &'a ClusterDb, view: &'a GroupView) -> Self {
        let mut resources: BTreeMap<&str, Vec<&Resource>> = BTreeMap::new();
        for resource in db.resources.values() {
            resources.entry(&resource.group).or_default().push(resource);
        }
        let mut planner = Planner {
            db,
            view,
            commands: Vec::new(),
            touched: BTreeSet::new(),
            moving: 0,
            waiting: BTreeMap::new(),
            homeless: Vec::new(),
            resources,
            promised: BTreeMap::new(),
            classes: BTreeMap::new(),
        };
        for group in db.groups.values().filter(|group| db.group_owner_stands(group)) {
            planner.enter(group);
        }
        planner
    }

    /// Counts a group with a standing owner.
    fn enter(&mut self, group: &'a Group) {
        let places: BTreeSet<NodeId> = group.owner.into_iter().chain(group.home()).collect();
        for node in places {
            self.arrive(group, node);
        }
        if matches!(group.state, GroupState::Releasing { to: Some(_), .. }) {
            self.moving += 1;
        }
        if let Some(home) = group.home().filter(|_| group.want_online) {
            self.promise(group, home, group.state == GroupState::Pending);
        }
    }

    fn promise(&mut self, group: &Group, node: NodeId, pending: bool) {
        let (memory_mib, cpus) = self.needs(group);
        let promised = self.promised.entry(node).or_default();
        promised.memory_mib = promised.memory_mib.saturating_add(memory_mib);
        promised.cpus = promised.cpus.saturating_add(cpus);
        promised.groups += 1;
        promised.pending += usize::from(pending);
    }

    fn withdraw(&mut self, group: &Group, node: NodeId) {
        let (memory_mib, cpus) = self.needs(group);
        let promised = self.promised.entry(node).or_default();
        promised.memory_mib = promised.memory_mib.saturating_sub(memory_mib);
        promised.cpus = promised.cpus.saturating_sub(cpus);
        promised.groups = promised.groups.saturating_sub(1);
    }

    /// Counts the group against the limits of the node.
    fn arrive(&mut self, group: &'a Group, node: NodeId) {
        let (memory_mib, _) = self.needs(group);
        let promised = self.promised.entry(node).or_default();
        promised.held_mib = promised.held_mib.saturating_add(memory_mib);
        for class in &group.policy.anti_affinity {
            let others = self.classes.entry((&class.class, node)).or_default();
            *others.entry(&group.name).or_insert(false) |= class.hard;
        }
    }

    /// How long ago that was. A wall clock that was set back by more than that counts as time gone by, so that nothing
    /// waits for ever.
    pub(super) fn age_ms(&self, at_unix_ms: u64) -> u64 {
        self.view.now_unix_ms.abs_diff(at_unix_ms)
    }

    /// The node's report, if it is of the incarnation that the database knows.
    pub(super) fn report(&self, node: NodeId) -> Option<&'a NodeReport> {
        let incarnation = self.db.nodes.get(&node)?.incarnation;
        self.view.reports.get(&node).filter(|report| report.incarnation == incarnation)
    }

    pub(super) fn resources(&self, group: &str) -> &[&'a Resource] {
        self.resources.get(group).map_or(&[], Vec::as_slice)
    }

    /// Memory (MiB) and processors of the group's virtual machines.
    pub(super) fn needs(&self, group: &Group) -> (u64, u64) {
        let wanted = self.resources(&group.name).iter().filter(|resource| resource.want_online);
        wanted.fold((0, 0), |(memory_mib, cpus), resource| {
            (resource.memory_mib().saturating_add(memory_mib), resource.cpus().saturating_add(cpus))
        })
    }

    pub(super) fn promised(&self, node: NodeId) -> Promised {
        self.promised.get(&node).copied().unwrap_or_default()
    }

    /// Another group that is, or will be, on the node, with its class; of those that must not be together with it, or of all.
    pub(super) fn company(
        &self,
        group: &'a Group,
        node: NodeId,
        hard_only: bool,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        group.policy.anti_affinity.iter().flat_map(move |own| {
            let there = self.classes.get(&(own.class.as_str(), node)).into_iter().flatten();
            let others =
                there.filter(move |(name, hard)| **name != group.name && (!hard_only || own.hard || **hard));
            others.map(move |(name, _)| (*name, own.class.as_str()))
        })
    }

    /// The resource that may not be on the node, if there is one.
    pub(super) fn impossible(&self, group: &Group, node: NodeId) -> Option<&'a str> {
        let not =
            |resource: &&&'a Resource| !resource.possible.is_empty() && !resource.possible.contains(&node);
        self.resources(&group.name).iter().find(not).map(|resource| resource.name.as_str())
    }

    /// Can the node have the group?
    pub(super) fn fit(&self, group: &'a Group, node: &Node) -> Result<(), Unfit<'a>> {
        let state = match node.state {
            NodeState::Joining => Some("was never up"),
            NodeState::Down => Some("is down"),
            NodeState::Isolated => Some("is isolated"),
            NodeState::Up if node.leaving => Some("is about to stop"),
            NodeState::Up => match node.admin {
                AdminState::Active => None,
                AdminState::Paused => Some("is paused"),
                AdminState::Draining => Some("is being drained"),
            },
        };
        if let Some(state) = state {
            return Err(Unfit::State(state));
        }
        if let Some(resource) = self.impossible(group, node.id) {
            return Err(Unfit::NotPossible(resource));
        }
        let Some(report) = self.report(node.id) else { return Err(Unfit::Silent) };
        if let Some((other, class)) = self.company(group, node.id, true).next() {
            return Err(Unfit::Together { group: other, class });
        }
        let (needs_mib, _) = self.needs(group);
        let left_mib = report.memory_mib.saturating_sub(self.memory_without(group, node.id));
        if report.memory_mib > 0 && needs_mib > left_mib {
            return Err(Unfit::Memory { left_mib, group: &group.name, needs_mib });
        }
        Ok(())
    }

    /// What other groups have or will have on the node, in MiB.
    fn memory_without(&self, group: &Group, node: NodeId) -> u64 {
        let there = group.owner == Some(node) || group.home() == Some(node);
        let there = there && self.db.group_owner_stands(group);
        let own = if there { self.needs(group).0 } else { 0 };
        self.promised(node).held_mib.saturating_sub(own)
    }

    /// The node that has promised to have the group, as far as this plan has not moved it.
    fn counted_at(&self, group: &Group) -> Option<NodeId> {
        let counted = group.want_online && !self.touched.contains(group.name.as_str());
        group.home().filter(|_| counted && self.db.group_owner_stands(group))
    }

    pub(super) fn failed_there(&self, group: &Group, node: NodeId) -> bool {
        let lately = group.policy.failover_period_ms;
        group.failures.iter().any(|failure| failure.node == node && self.age_ms(failure.at_unix_ms) < lately)
    }

    /// The node's place in the order.
    pub(super) fn key(&self, group: &'a Group, node: NodeId) -> Key {
        let last = group.owner.or(group.last_owner);
        let (memory_mib, cpus) = self.needs(group);
        let home = self.counted_at(group) == Some(node);
        let promised = self.promised(node);
        let report = self.report(node);
        let (has_mib, has_cpus) = report.map_or((0, 0), |report| (report.memory_mib, u64::from(report.cpus)));
        let with = |sum: u64, own: u64| if home { sum } else { sum.saturating_add(own) };
        Key {
            failed_there: self.failed_there(group, node),
            rank: group.rank(node),
            not_last: !(group.policy.persistent && last == Some(node)),
            company: self.company(group, node, false).count(),
            memory_permille: permille(with(promised.memory_mib, memory_mib), has_mib),
            cpu_permille: permille(with(promised.cpus, cpus), has_cpus),
            groups: promised.groups.saturating_sub(usize::from(home)),
            node,
        }
    }

    /// The best owner, `not` left out.
    pub(super) fn best(&self, group: &'a Group, not: Option<NodeId>) -> Result<Key, Blocked> {
        let others = self.db.nodes.values().filter(|node| Some(node.id) != not);
        let fit = others.filter(|node| self.fit(group, node).is_ok());
        let best = fit.map(|node| self.key(group, node.id)).min();
        best.ok_or_else(|| self.blocked(group, not))
    }

    fn blocked(&self, group: &'a Group, not: Option<NodeId>) -> Blocked {
        let others = self.db.nodes.values().filter(|node| Some(node.id) != not);
        let mut why = String::new();
        for node in others {
            match self.fit(group, node) {
                Err(Unfit::Silent) => return Blocked::Wait,
                Err(unfit) => {
                    if !why.is_empty() {
                        why.push_str("; ");
                    }
                    why.push_str(&unfit.about(node));
                }
                Ok(()) => {}
            }
        }
        if why.is_empty() {
            why.push_str("there is no other");
        }
        Blocked::NoNode(why)
    }

    pub(super) fn assign(&mut self, group: &'a Group, to: NodeId, reason: String) {
        self.promise(group, to, true);
        self.arrive(group, to);
        self.touched.insert(&group.name);
        let (name, from_generation) = (group.name.clone(), group.generation);
        self.commands.push(Command::GroupAssign { name, from_generation, to, reason });
    }

    pub(super) fn release(
        &mut self,
        group: &'a Group,
        to: Option<NodeId>,
        (how, cause): (MoveKind, MoveCause),
        reason: String,
    ) {
        if let Some(home) = self.counted_at(group) {
            self.withdraw(group, home);
        }
        if let Some(to) = to {
            self.promise(group, to, false);
            self.arrive(group, to);
            self.moving += 1;
        }
        self.touched.insert(&group.name);
        let (name, generation) = (group.name.clone(), group.generation);
        self.commands.push(Command::GroupRelease { name, generation, to, how, reason, cause });
    }

    /// Leaves the group without an owner, and says so once per reason.
    pub(super) fn unplaced(&mut self, group: &'a Group, reason: String) {
        if matches!(&group.state, GroupState::Offline { reason: already } if *already == reason) {
            return;
        }
        self.touched.insert(&group.name);
        let (name, from_generation) = (group.name.clone(), group.generation);
        self.commands.push(Command::GroupUnplaced { name, from_generation, reason });
    }
}

impl fmt::Debug for Planner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Planner").field("commands", &self.commands).finish_non_exhaustive()
    }
}

/// A part of a whole in thousandths; of nothing known, none.
pub(super) fn permille(part: u64, whole: u64) -> u64 {
    part.saturating_mul(1000).checked_div(whole).unwrap_or(0)
}
