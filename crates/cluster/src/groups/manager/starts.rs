//! Rule 2: groups that are wanted online and have no owner, or lost theirs.
//!
//! Higher priority first: a lower one waits while a higher one could start or is coming online, at most `group_start_wait_ms` for
//! each. `start_after` goes before priority: who waits for another group keeps nobody waiting. After a start of the whole cluster,
//! a group waits up to `group_settle_ms` for a node that it would rather go to and that is not up yet.

use super::super::candidates::{Blocked, Key, Planner};
use crate::db::{Group, GroupState, MoveCause, NodeState};
use csv_types::NodeId;
use std::cmp::Reverse;

/// What became of a group that should start.
enum Outcome {
    /// It has an owner.
    Started,
    /// It could start and will soon: lower ones wait.
    Soon(String),
    /// It cannot start now; nobody waits for it.
    Not(String),
    /// There is nothing to wait for, its state says why.
    Stays,
}

pub(super) fn start(planner: &mut Planner<'_>) {
    let db = planner.db;
    let wait_ms = db.settings.group_start_wait_ms;
    let mut needing: Vec<&Group> = Vec::new();
    let mut barrier: Option<&Group> = None;
    for group in db.groups.values().filter(|group| group.want_online) {
        if !db.group_owner_stands(group) {
            needing.push(group);
        } else if group.state == GroupState::Pending && planner.age_ms(group.since_unix_ms) < wait_ms {
            barrier = higher(barrier, group);
        }
    }
    if needing.is_empty() {
        return;
    }
    needing.sort_by_key(|group| (Reverse(group.policy.priority), &group.name));
    let cold = is_cold(planner);
    for group in needing {
        match start_one(planner, group, barrier, cold) {
            Outcome::Started => barrier = higher(barrier, group),
            Outcome::Soon(why) => {
                if planner.age_ms(waits_since(planner, group)) < wait_ms {
                    barrier = higher(barrier, group);
                }
                planner.waiting.insert(&group.name, why);
            }
            Outcome::Not(why) => drop(planner.waiting.insert(&group.name, why)),
            Outcome::Stays => {}
        }
    }
}

/// Says of the groups that no node can take why not; last, when it is known what else this plan gives to the nodes.
pub(super) fn say_homeless(planner: &mut Planner<'_>) {
    for group in std::mem::take(&mut planner.homeless) {
        if let Err(Blocked::NoNode(why)) = planner.best(group, None) {
            planner.unplaced(group, format!("no node can take it: {why}"));
        }
    }
}

fn higher<'a>(one: Option<&'a Group>, other: &'a Group) -> Option<&'a Group> {
    Some(one.filter(|one| one.policy.priority >= other.policy.priority).unwrap_or(other))
}

/// Did the whole cluster start a moment ago?
fn is_cold(planner: &Planner<'_>) -> bool {
    let up = planner.db.nodes.values().filter(|node| node.is_up());
    let first = up.map(|node| node.since_unix_ms).min();
    first.is_some_and(|first| planner.age_ms(first) < planner.db.settings.group_settle_ms)
}

/// When the group began to be without an owner that stands.
fn waits_since(planner: &Planner<'_>, group: &Group) -> u64 {
    match group.owner.and_then(|owner| planner.db.nodes.get(&owner)) {
        Some(owner) => owner.since_unix_ms,
        None => group.since_unix_ms.max(group.ordered_unix_ms.unwrap_or(0)),
    }
}

fn start_one<'a>(
    planner: &mut Planner<'a>,
    group: &'a Group,
    barrier: Option<&'a Group>,
    cold: bool,
) -> Outcome {
    let db = planner.db;
    if !planner.has_stopped(group) {
        let last = group.owner.or(group.last_owner).map_or_else(String::new, |last| db.node_name(last));
        return Outcome::Not(format!("{last} may not have stopped it yet"));
    }
    let lost = lost_reason(planner, group);
    if group.policy.priority == 0 && group.ordered_unix_ms.is_none() {
        if let Some(lost) = lost {
            let name = &group.name;
            let reason =
                format!("{lost}; a group of priority 0 is started with `csvctl group online {name}`");
            planner.unplaced(group, reason);
        }
        return Outcome::Stays;
    }
    if let Some(before) = not_yet_online(planner, group) {
        // Not left with an owner that is gone, since this may last; but a move will soon be over.
        let moves = matches!(before.state, GroupState::Releasing { .. });
        let reason = format!("it starts after group {}, which is not online", before.name);
        if let Some(lost) = lost.filter(|_| !moves) {
            planner.unplaced(group, format!("{lost}; {reason}"));
        }
        return Outcome::Not(reason);
    }
    if let Some(first) = barrier.filter(|first| first.policy.priority > group.policy.priority) {
        return Outcome::Not(format!("group {} of higher priority starts first", first.name));
    }
    let best = match ordered(planner, group).map_or_else(|| planner.best(group, None), Ok) {
        Ok(best) => best,
        Err(Blocked::Wait) => return Outcome::Soon("a node has not reported yet".into()),
        Err(Blocked::NoNode(_)) if cold => {
            return Outcome::Not("the cluster has just started, and no node can take it yet".into());
        }
        Err(Blocked::NoNode(_)) => {
            planner.homeless.push(group);
            return Outcome::Stays;
        }
    };
    if let Some(missing) = awaited(planner, group, &best).filter(|_| cold) {
        return Outcome::Soon(format!("the cluster has just started: it waits for {missing}"));
    }
    let to = best.node();
    let most = usize::try_from(db.settings.max_parallel_starts).unwrap_or(usize::MAX);
    if planner.promised(to).pending >= most {
        let name = db.node_name(to);
        return Outcome::Soon(format!("as many groups as allowed ({most}) are coming online on {name}"));
    }
    let reason = lost.unwrap_or_else(|| match &group.state {
        GroupState::Offline { reason } => format!("it had no owner: {reason}"),
        GroupState::Pending
        | GroupState::Online
        | GroupState::Partial { .. }
        | GroupState::Failed { .. }
        | GroupState::Releasing { .. } => String::new(),
    });
    planner.assign(group, to, reason);
    Outcome::Started
}

/// The node that an administrator was moving it to when its owner went, if it can have it.
fn ordered<'a>(planner: &Planner<'a>, group: &'a Group) -> Option<Key> {
    let GroupState::Releasing { to: Some(to), cause: MoveCause::Order, .. } = &group.state else {
        return None;
    };
    let node = planner.db.nodes.get(to)?;
    planner.fit(group, node).is_ok().then(|| planner.key(group, *to))
}

/// How the owner was lost, if there was one.
fn lost_reason(planner: &Planner<'_>, group: &Group) -> Option<String> {
    let owner = group.owner?;
    let name = planner.db.node_name(owner);
    Some(match planner.db.nodes.get(&owner) {
        None => format!("{name} is gone"),
        Some(node) => match node.state {
            NodeState::Down | NodeState::Joining => format!("{name} is down: {}", node.down_reason),
            NodeState::Up | NodeState::Isolated => format!("{name} started again"),
        },
    })
}

/// The first of the groups to start after that is wanted and not online.
fn not_yet_online<'a>(planner: &Planner<'a>, group: &'a Group) -> Option<&'a Group> {
    let db = planner.db;
    let online = |before: &Group| {
        let state = matches!(before.state, GroupState::Online | GroupState::Partial { .. });
        !before.want_online || (state && db.group_owner_stands(before))
    };
    let mut before = group.policy.start_after.iter().filter_map(|name| db.groups.get(name));
    before.find(|before| !online(before))
}

/// A node that is not up yet, or does not report, and that the group would rather go to than to the best of those that are.
fn awaited(planner: &Planner<'_>, group: &Group, best: &Key) -> Option<String> {
    let not_there = |node: &&crate::db::Node| match node.state {
        NodeState::Joining | NodeState::Down | NodeState::Isolated => true,
        NodeState::Up => planner.report(node.id).is_none(),
    };
    let better = |id: NodeId| {
        let last = group.owner.or(group.last_owner) == Some(id);
        let wish = (planner.failed_there(group, id), group.rank(id), !(group.policy.persistent && last));
        wish < best.wish()
    };
    let nodes = planner.db.nodes.values().filter(not_there);
    let mut wanted = nodes.filter(|node| better(node.id) && planner.impossible(group, node.id).is_none());
    wanted.next().map(|node| node.name.clone())
}
