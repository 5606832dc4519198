//! Waits until a group or a resource is as it was ordered to be. This file decides, and is pure; [`run`] looks and shows.
//!
//! The order itself is carried out by the cluster, whoever looks on: a wait that is given up, by Ctrl-C as well, changes nothing.
//!
//! * The node that is asked may not have heard of the order yet: nothing is concluded before its database has the order's event.
//! * A bad state may be that from before the order: it counts only when something has changed since, or after [`GRACE`].
//! * A group that failed is about to move to another node, until it is given up, or stands still for [`GRACE`].
//! * Nobody is waited for for ever: when nothing has changed for as long as its slowest resource may take, and [`MARGIN`], or
//!   after [`WAIT_MAX`], the wait ends.

mod progress;
mod report;
mod run;

use csv_cluster::db::{ClusterDb, EventKind, Group, GroupState, Resource, ResourceState, ResourceStatus};
use csv_types::NodeId;
use csvd::groups::MoveProgress;
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) use report::place;
pub(crate) use run::{notes, until};

/// For a node to act on an order.
const GRACE: Duration = Duration::from_secs(5);
/// Beyond what a policy says that something may take.
const MARGIN: Duration = Duration::from_secs(60);
/// The longest wait: a live migration of a big machine over a slow network takes hours.
const WAIT_MAX: Duration = Duration::from_secs(6 * 3600);

/// What was ordered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Goal {
    /// The group is online.
    Online,
    /// No node has the group.
    Offline,
    /// The group is online on that node.
    Moved(NodeId),
    /// The resource is online.
    ResourceOnline(String),
    /// The resource is offline.
    ResourceOffline(String),
}

/// What a look says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Not yet.
    Wait,
    /// It is as ordered.
    Reached,
    /// It will not be; what happened, and what to do next.
    Not(String),
}

/// One look at the cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look<'a> {
    pub(crate) db: &'a ClusterDb,
    /// What the group's start waits for, by the word of the manager of groups.
    pub(crate) waits: Option<&'a str>,
    /// How far its move has come.
    pub(crate) moving: Option<&'a MoveProgress>,
    /// Since the order.
    pub(crate) at: Duration,
}

/// How a group and its resources are. Two that differ mean that something has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Print {
    owner: Option<NodeId>,
    generation: u64,
    state: GroupState,
    since_unix_ms: u64,
    resources: BTreeMap<String, ResourceStatus>,
}

impl Print {
    fn of(db: &ClusterDb, group: &Group) -> Print {
        let resources = crate::names::resources_of(db, &group.name);
        Print {
            owner: group.owner,
            generation: group.generation,
            state: group.state.clone(),
            since_unix_ms: group.since_unix_ms,
            resources: resources.map(|of| (of.name.clone(), of.status.clone())).collect(),
        }
    }
}

/// Watches one group.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    pub(crate) group: String,
    pub(crate) goal: Goal,
    /// Number of the last event before the order.
    pub(crate) event: u64,
    /// Has the order changed anything?
    changed: bool,
    before: Print,
    last: (Print, Option<MoveProgress>),
    last_change: Duration,
}

impl Watch {
    /// `db` is from before the order; `changed`: the order changed something.
    pub(crate) fn new(db: &ClusterDb, group: &Group, goal: Goal, changed: bool) -> Watch {
        let before = Print::of(db, group);
        Watch {
            group: group.name.clone(),
            goal,
            event: db.events.next.saturating_sub(1),
            changed,
            last: (before.clone(), None),
            before,
            last_change: Duration::ZERO,
        }
    }

    /// Is it as ordered?
    pub(crate) fn look(&mut self, look: Look<'_>) -> Verdict {
        let Some(group) = look.db.groups.get(&self.group) else {
            return Verdict::Not(format!("group {} was removed meanwhile", self.group));
        };
        let now = (Print::of(look.db, group), look.moving.cloned());
        if now != self.last {
            self.last = now;
            self.last_change = look.at;
        }
        let verdict = if self.caught_up(look) { self.verdict(look, group) } else { Verdict::Wait };
        if verdict != Verdict::Wait {
            return verdict;
        }
        let still = look.at.saturating_sub(self.last_change);
        let limit = quiet_limit(look.db, group);
        if still < limit && look.at < WAIT_MAX {
            return Verdict::Wait;
        }
        Verdict::Not(report::stuck(look, group, if look.at < WAIT_MAX { still } else { look.at }))
    }

    /// Has the node that is asked heard of the order?
    fn caught_up(&self, look: Look<'_>) -> bool {
        let subject = match &self.goal {
            Goal::Online | Goal::Offline | Goal::Moved(_) => &self.group,
            Goal::ResourceOnline(name) | Goal::ResourceOffline(name) => name,
        };
        let mut news = look.db.events.after(self.event);
        !self.changed || look.at >= GRACE || news.any(|event| event.subject == *subject)
    }

    fn verdict(&self, look: Look<'_>, group: &Group) -> Verdict {
        match &self.goal {
            Goal::Online => self.online(look, group),
            Goal::Offline => offline(group),
            Goal::Moved(to) => self.moved(look, group, *to),
            Goal::ResourceOnline(name) => self.resource_online(look, group, name),
            Goal::ResourceOffline(name) => self.resource_offline(look, group, name),
        }
    }

    /// What is seen is not from before the order.
    fn settled(&self, look: Look<'_>) -> bool {
        self.last.0 != self.before || look.at >= GRACE
    }

    /// Nothing has changed for a while.
    fn calm(&self, look: Look<'_>) -> bool {
        look.at.saturating_sub(self.last_change) >= GRACE
    }

    fn online(&self, look: Look<'_>, group: &Group) -> Verdict {
        if group.state == GroupState::Online && group.want_online && look.db.group_owner_stands(group) {
            return Verdict::Reached;
        }
        self.bad_end(look, group).map_or(Verdict::Wait, Verdict::Not)
    }

    fn moved(&self, look: Look<'_>, group: &Group, to: NodeId) -> Verdict {
        let db = look.db;
        let stands = db.group_owner_stands(group);
        if group.generation > self.before.generation && group.owner == Some(to) {
            let partial_as_before = matches!(group.state, GroupState::Partial { .. })
                && matches!(self.before.state, GroupState::Partial { .. })
                && !pending(db, group);
            let there = group.state == GroupState::Online || partial_as_before;
            if there && stands && group.want_online {
                return Verdict::Reached;
            }
            return self.bad_end(look, group).map_or(Verdict::Wait, Verdict::Not);
        }
        if group.generation == self.before.generation && group.owner == self.before.owner && stands {
            return self.not_gone_yet(look, group, to);
        }
        if group.state == GroupState::Online && stands {
            let (is, not) = (report::place(db, group), db.node_name(to));
            let why = report::what_happened(db, group, self.event);
            return Verdict::Not(format!("group {} is {is}, not on {not}{why}", group.name));
        }
        self.bad_end(look, group).map_or(Verdict::Wait, Verdict::Not)
    }

    /// The owner from before the order has it still.
    fn not_gone_yet(&self, look: Look<'_>, group: &Group, to: NodeId) -> Verdict {
        let db = look.db;
        let on_its_way = matches!(&group.state, GroupState::Releasing { to: Some(node), .. } if *node == to);
        if on_its_way || !self.settled(look) {
            return Verdict::Wait;
        }
        let cancelled = db
            .events
            .after(self.event)
            .filter(|event| event.id == EventKind::GroupMoveCancelled.id() && event.subject == group.name);
        Verdict::Not(match cancelled.last() {
            Some(event) => {
                format!("the move was given up: {}\n{}", event.message, report::move_again(group))
            }
            None if !group.want_online => {
                format!("group {}: somebody ordered it offline meanwhile", group.name)
            }
            None => format!(
                "group {} does not go to {} any more; it is {}{}\n{}",
                group.name,
                db.node_name(to),
                report::place(db, group),
                report::what_happened(db, group, self.event),
                report::move_again(group)
            ),
        })
    }

    fn resource_online(&self, look: Look<'_>, group: &Group, name: &str) -> Verdict {
        let db = look.db;
        let Some(resource) = db.resources.get(name) else {
            return Verdict::Not(format!("resource {name} was removed meanwhile"));
        };
        let online = resource.status.state == ResourceState::Online;
        if online && resource.want_online && db.group_owner_stands(group) {
            return Verdict::Reached;
        }
        if !resource.want_online {
            return Verdict::Not(format!("resource {name}: somebody ordered it offline meanwhile"));
        }
        if is_pending(resource.status.state) {
            return Verdict::Wait;
        }
        if group.state == GroupState::Online && self.calm(look) {
            return Verdict::Not(report::trouble(db, group));
        }
        self.bad_end(look, group).map_or(Verdict::Wait, Verdict::Not)
    }

    fn resource_offline(&self, look: Look<'_>, group: &Group, name: &str) -> Verdict {
        let Some(resource) = look.db.resources.get(name) else { return Verdict::Reached };
        if resource.want_online {
            return Verdict::Not(format!("resource {name}: somebody ordered it online meanwhile"));
        }
        match resource.status.state {
            ResourceState::Offline => Verdict::Reached,
            // Nobody looks after it, and nobody has it.
            _ if group.owner.is_none() => Verdict::Reached,
            ResourceState::Failed if self.settled(look) && self.calm(look) => {
                Verdict::Not(report::trouble(look.db, group))
            }
            ResourceState::Failed
            | ResourceState::Online
            | ResourceState::OnlinePending
            | ResourceState::OfflinePending
            | ResourceState::Unknown => Verdict::Wait,
        }
    }

    /// Why a group that is to be online will not be, if that is known.
    fn bad_end(&self, look: Look<'_>, group: &Group) -> Option<String> {
        let db = look.db;
        if !group.want_online {
            return Some(format!("group {}: somebody ordered it offline meanwhile", group.name));
        }
        let calm = self.calm(look);
        let at_rest = self.settled(look) && (calm || !pending(db, group));
        let bad = match &group.state {
            GroupState::Failed { .. } => at_rest && (calm || group.given_up.is_some() || group.maintenance),
            GroupState::Partial { .. } => at_rest,
            // What waits says for what; what does not has no node to go to.
            GroupState::Offline { .. } => calm && look.waits.is_none(),
            GroupState::Pending | GroupState::Online | GroupState::Releasing { .. } => false,
        };
        let stays = group.owner.is_none() || db.group_owner_stands(group);
        (bad && stays).then(|| report::trouble(db, group))
    }
}

fn offline(group: &Group) -> Verdict {
    if group.want_online {
        return Verdict::Not(format!("group {}: somebody ordered it online meanwhile", group.name));
    }
    if group.owner.is_none() { Verdict::Reached } else { Verdict::Wait }
}

/// Is something of the group on its way?
fn pending(db: &ClusterDb, group: &Group) -> bool {
    let wanted = |of: &&Resource| of.want_online;
    crate::names::resources_of(db, &group.name).filter(wanted).any(|of| is_pending(of.status.state))
}

fn is_pending(state: ResourceState) -> bool {
    match state {
        ResourceState::OnlinePending | ResourceState::OfflinePending | ResourceState::Unknown => true,
        ResourceState::Offline | ResourceState::Online | ResourceState::Failed => false,
    }
}

/// How long nothing need change although all is well.
fn quiet_limit(db: &ClusterDb, group: &Group) -> Duration {
    let slowest = crate::names::resources_of(db, &group.name)
        .map(|of| of.policy.pending_timeout_ms.saturating_add(of.policy.restart_delay_ms))
        .max();
    let start = if group.owner.is_none() { db.settings.group_start_wait_ms } else { 0 };
    Duration::from_millis(slowest.unwrap_or(0).max(start)).saturating_add(MARGIN)
}

#[cfg(test)]
mod tests;
