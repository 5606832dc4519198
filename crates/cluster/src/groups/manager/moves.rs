//! Rules 3 to 6: groups that have an owner which stands, and should have another.

use super::super::candidates::{Blocked, Planner};
use crate::db::group::GROUP_FAILURES_MAX;
use crate::db::{Failback, Group, GroupState, MoveCause, MoveKind, Node};
use csv_types::NodeId;
use std::cmp::Reverse;
use std::collections::BTreeSet;

const MINUTES_PER_DAY: i64 = 1440;

/// What failed on its owner for good goes to another node, or stays failed.
pub(super) fn failures(planner: &mut Planner<'_>) {
    for group in planner.db.groups.values() {
        let GroupState::Failed { reason } = &group.state else { continue };
        if group.maintenance {
            continue;
        }
        let Some(owner) = planner.movable(group) else { continue };
        let best = planner.best(group, Some(owner.id));
        match best {
            // The drain takes it away, or the node's end does.
            Ok(_) if owner.gives_volumes_up() => {}
            Err(_) if owner.leaving => {}
            Err(Blocked::Wait) => {}
            Ok(best) => match exhausted(planner, group) {
                None => {
                    let reason = format!("it failed on {}: {reason}", owner.name);
                    let how = (MoveKind::Shutdown, MoveCause::Failure);
                    planner.release(group, Some(best.node()), how, reason);
                }
                Some(why) => give_up(planner, group, why),
            },
            Err(Blocked::NoNode(why)) => {
                let why = exhausted(planner, group).unwrap_or(format!("no other node can take it: {why}"));
                give_up(planner, group, why);
            }
        }
    }
}

fn give_up<'a>(planner: &mut Planner<'a>, group: &'a Group, reason: String) {
    if group.given_up.is_none() {
        let (name, generation) = (group.name.clone(), group.generation);
        planner.commands.push(crate::db::Command::GroupGiveUp { name, generation, reason });
    }
}

/// Why the group must not move for failure again, if so.
fn exhausted(planner: &Planner<'_>, group: &Group) -> Option<String> {
    let policy = &group.policy;
    let threshold = match policy.failover_threshold {
        Some(threshold) => usize::try_from(threshold).unwrap_or(usize::MAX),
        None => planner.db.nodes.len().saturating_sub(1).max(1),
    };
    // No more are on record.
    let threshold = threshold.min(GROUP_FAILURES_MAX);
    let lately = |at: &&u64| planner.age_ms(**at) < policy.failover_period_ms;
    if group.failovers.iter().filter(lately).count() < threshold {
        return None;
    }
    if threshold == 0 {
        return Some("its policy allows no failover".into());
    }
    let minutes = policy.failover_period_ms / 60_000;
    let period =
        if minutes.is_multiple_of(60) { format!("{} h", minutes / 60) } else { format!("{minutes} min") };
    let times = if threshold == 1 { "once".into() } else { format!("{threshold} times") };
    Some(format!("it was moved for failure {times} within {period}, more its policy does not allow"))
}

/// Moves groups away from draining and leaving nodes. One that no other node can take stays on a draining node, and is
/// ended in good order on one that is about to stop.
pub(super) fn drain(planner: &mut Planner<'_>) {
    let db = planner.db;
    if !db.nodes.values().any(Node::gives_volumes_up) {
        return;
    }
    let mut groups: Vec<(&Group, &Node)> = Vec::new();
    for group in db.groups.values() {
        let Some(owner) = planner.movable(group).filter(|owner| owner.gives_volumes_up()) else { continue };
        let starts = group.state == GroupState::Pending
            && planner.age_ms(group.since_unix_ms) < db.settings.group_start_wait_ms;
        if owner.leaving || !starts {
            groups.push((group, owner));
        }
    }
    groups.sort_by_key(|(group, _)| (Reverse(group.policy.priority), &group.name));
    for (group, owner) in groups {
        let what = if owner.leaving { "is about to stop" } else { "is being drained" };
        let reason = format!("{} {what}", owner.name);
        match planner.best(group, Some(owner.id)) {
            Ok(best) if planner.room_to_move() => {
                planner.release(group, Some(best.node()), (how(group), MoveCause::Drain), reason);
            }
            Err(Blocked::NoNode(why)) if owner.leaving => {
                let reason = format!("{reason}, and no other node can take it: {why}");
                planner.release(group, None, (MoveKind::Shutdown, MoveCause::Drain), reason);
            }
            Ok(_) | Err(Blocked::Wait | Blocked::NoNode(_)) => {}
        }
    }
}

/// How the group's virtual machines go when nothing is wrong with them.
fn how(group: &Group) -> MoveKind {
    match group.state {
        GroupState::Online | GroupState::Partial { .. } => group.policy.move_kind,
        GroupState::Offline { .. }
        | GroupState::Pending
        | GroupState::Failed { .. }
        | GroupState::Releasing { .. } => MoveKind::Shutdown,
    }
}

/// Moves groups away from where they may not be any more, if there is another place.
pub(super) fn hard_rules(planner: &mut Planner<'_>) {
    for group in planner.db.groups.values() {
        if group.maintenance {
            continue;
        }
        let Some(owner) = planner.movable(group) else { continue };
        let Some(reason) = broken_rule(planner, group, owner) else { continue };
        if !planner.room_to_move() {
            return;
        }
        if let Ok(best) = planner.best(group, Some(owner.id)) {
            planner.release(group, Some(best.node()), (how(group), MoveCause::Rule), reason);
        }
    }
}

fn broken_rule<'a>(planner: &Planner<'a>, group: &'a Group, owner: &Node) -> Option<String> {
    if let Some(resource) = planner.impossible(group, owner.id) {
        return Some(format!("{} is no possible owner of resource {resource} any more", owner.name));
    }
    // Of two that must not be together, the lesser goes.
    let yields_to = |name: &str| {
        let Some(other) = planner.db.groups.get(name) else { return false };
        let rank = |group: &Group| (Reverse(group.policy.priority), group.name.clone());
        planner.movable(other).is_some_and(|there| there.id == owner.id) && rank(other) < rank(group)
    };
    let mut company = planner.company(group, owner.id, true);
    let (other, class) = company.find(|(other, _)| yields_to(other))?;
    Some(format!("group {other} of the same class '{class}' is on {} too (hard anti-affinity)", owner.name))
}

/// Sends groups back to their most preferred owner, one at a time for each node.
pub(super) fn failback(planner: &mut Planner<'_>) {
    let db = planner.db;
    let waits = |group: &&Group| {
        group.displaced
            && group.state == GroupState::Online
            && !group.maintenance
            && group.policy.failback != Failback::Never
            && group.owner.is_some_and(|owner| group.rank(owner) > 0)
            && !group.policy.preferred.is_empty()
    };
    let waiting: Vec<&Group> = db.groups.values().filter(waits).collect();
    if waiting.is_empty() {
        return;
    }
    let mut busy = busy_nodes(planner);
    for group in waiting {
        let Some(owner) = planner.movable(group) else { continue };
        if !planner.room_to_move() || !in_window(planner, group.policy.failback) {
            continue;
        }
        let Some(to) = better_owner(planner, group, owner.id) else { continue };
        if busy.contains(&to) || busy.contains(&owner.id) {
            continue;
        }
        busy.extend([to, owner.id]);
        let reason = format!("it goes back to {}, a preferred owner", db.node_name(to));
        planner.release(group, Some(to), (how(group), MoveCause::Failback), reason);
    }
}

/// Nodes where a group is arriving, coming online or leaving.
fn busy_nodes(planner: &Planner<'_>) -> BTreeSet<NodeId> {
    let mut busy = BTreeSet::new();
    for group in planner.db.groups.values().filter(|group| planner.db.group_owner_stands(group)) {
        match &group.state {
            GroupState::Pending => busy.extend(group.owner),
            GroupState::Releasing { to, .. } => busy.extend(group.owner.into_iter().chain(*to)),
            GroupState::Online
            | GroupState::Partial { .. }
            | GroupState::Failed { .. }
            | GroupState::Offline { .. } => {}
        }
    }
    busy
}

/// The most preferred owner that can take the group and is up for some time, if the present one is preferred less.
fn better_owner<'a>(planner: &Planner<'a>, group: &'a Group, owner: NodeId) -> Option<NodeId> {
    let db = planner.db;
    let better = group.policy.preferred.iter().take(group.rank(owner));
    let ready = |node: &&&Node| {
        let settled = planner.age_ms(node.since_unix_ms) >= db.settings.settle_ms;
        // What failed somewhere since that node came up may have failed there: not in a circle.
        let period_ms = group.policy.failover_period_ms;
        let mut failovers = group.failovers.iter();
        let failed = failovers.any(|at| *at >= node.since_unix_ms && planner.age_ms(*at) < period_ms);
        settled && !failed && planner.fit(group, node).is_ok()
    };
    let nodes: Vec<&Node> = better.filter_map(|id| db.nodes.get(id)).collect();
    nodes.iter().find(ready).map(|node| node.id)
}

fn in_window(planner: &Planner<'_>, failback: Failback) -> bool {
    match failback {
        Failback::Never => false,
        Failback::AtOnce => true,
        Failback::Window { from_minute, to_minute } => {
            let utc_min = i64::try_from(planner.view.now_unix_ms / 60_000).unwrap_or(0);
            let minute = (utc_min + i64::from(planner.view.utc_offset_min)).rem_euclid(MINUTES_PER_DAY);
            let (from, to) = (i64::from(from_minute), i64::from(to_minute));
            if from < to { (from..to).contains(&minute) } else { minute >= from || minute < to }
        }
    }
}
