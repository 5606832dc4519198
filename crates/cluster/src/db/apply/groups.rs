//! Commands about groups: what an administrator wants of them, and who has them.

use super::super::ClusterDb;
use super::super::command::{Answer, Command};
use super::super::events::EventKind;
use super::super::group::{
    Failback, GROUP_FAILURES_MAX, Group, GroupFailure, GroupPolicy, GroupState, MoveCause, MoveKind,
    PRIORITY_MAX,
};
use super::super::refused::Refused;
use super::super::resource::{ResourceState, ResourceStatus, WHY_BYTES_MAX};
use super::{At, check_name, done, unchanged};
use crate::groups::expr;
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// Classes of anti-affinity, and groups in `start_after`, of one group.
const POLICY_LIST_MAX: usize = 32;
const MINUTES_PER_DAY: u16 = 1440;
const PERIOD_MS: std::ops::RangeInclusive<u64> = 60_000..=30 * 86_400_000;
const THRESHOLD_MAX: u32 = 1000;

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_group(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::GroupAdd { name, policy } = command {
            self.group_add(at, name, policy)
        } else if let Command::GroupPolicy { name, policy } = command {
            self.group_policy(at, name, policy)
        } else if let Command::GroupRemove { name } = command {
            self.group_remove(at, name)
        } else if let Command::GroupOnline { name } = command {
            self.group_online(at, name)
        } else if let Command::GroupOffline { name, reason } = command {
            self.group_offline(at, name, reason)
        } else if let Command::GroupMaintenance { name, on } = command {
            self.group_maintenance(at, name, *on)
        } else if let Command::GroupAssign { name, from_generation, to, reason } = command {
            self.group_assign(at, name, *from_generation, *to, reason)
        } else if let Command::GroupStatus { name, generation, node, state, resources } = command {
            self.group_status(at, (name, *generation, *node), state.as_ref(), resources)
        } else if let Command::GroupRelease { name, generation, to, how, reason, cause } = command {
            self.group_release(at, (name, *generation), *to, (*how, *cause), reason)
        } else if let Command::GroupReleased { name, generation, node } = command {
            self.group_released(at, name, *generation, *node)
        } else if let Command::GroupMigrated { name, generation, node } = command {
            self.group_migrated(at, name, *generation, *node)
        } else if let Command::GroupReleaseCancelled { name, generation, node, reason } = command {
            self.group_release_cancelled(at, (name, *generation, *node), reason)
        } else if let Command::GroupUnplaced { name, from_generation, reason } = command {
            self.group_unplaced(at, name, *from_generation, reason)
        } else if let Command::GroupGiveUp { name, generation, reason } = command {
            self.group_give_up(at, name, *generation, reason)
        } else {
            return None;
        })
    }

    pub(super) fn need_group(&self, name: &str) -> Result<&Group, Refused> {
        self.groups.get(name).ok_or_else(|| Refused::NotFound { what: "group".into(), name: name.into() })
    }

    fn need_generation(&self, name: &str, generation: u64) -> Result<&Group, Refused> {
        let group = self.need_group(name)?;
        if group.generation == generation {
            return Ok(group);
        }
        Err(Refused::StaleGroup { group: name.into(), got: generation, current: group.generation })
    }

    /// The group, if that node has it under that generation and was not given up since.
    pub(super) fn need_group_owner(
        &self,
        name: &str,
        generation: u64,
        node: NodeId,
    ) -> Result<&Group, Refused> {
        let group = self.need_generation(name, generation)?;
        if group.owner == Some(node) && self.group_owner_stands(group) {
            return Ok(group);
        }
        let owner = match group.owner {
            Some(owner) if owner == node => "nobody any more (it was given up)".into(),
            Some(owner) => self.node_name(owner),
            None => "nobody".into(),
        };
        Err(Refused::NotGroupOwner { group: name.into(), node: self.node_name(node), owner })
    }

    fn group_state(group: &Group, why: &str) -> Refused {
        Refused::GroupState { group: group.name.clone(), state: group.state.to_string(), why: why.into() }
    }

    fn check_policy(&self, name: &str, policy: &GroupPolicy) -> Result<(), Refused> {
        self.check_nodes_once("preferred owners", &policy.preferred)?;
        let invalid = |text: String| Err(Refused::Invalid(text));
        if policy.priority > PRIORITY_MAX {
            return invalid(format!("a group's priority is 0 to {PRIORITY_MAX}, not {}", policy.priority));
        }
        if !PERIOD_MS.contains(&policy.failover_period_ms) {
            return invalid("the failover period is 1 minute to 30 days".into());
        }
        if policy.failover_threshold.is_some_and(|threshold| threshold > THRESHOLD_MAX) {
            return invalid(format!("the failover threshold is 0 to {THRESHOLD_MAX}"));
        }
        if let Failback::Window { from_minute, to_minute } = policy.failback {
            let minute = |minute: u16| minute < MINUTES_PER_DAY;
            if !minute(from_minute) || !minute(to_minute) || from_minute == to_minute {
                return invalid(
                    "a failback window is from one minute of the day to another, such as 22:00-04:00".into(),
                );
            }
        }
        if policy.anti_affinity.len().max(policy.start_after.len()) > POLICY_LIST_MAX {
            return Err(Refused::TooMany {
                what: "anti-affinity classes or groups to start after".into(),
                max: POLICY_LIST_MAX as u64,
            });
        }
        for class in &policy.anti_affinity {
            check_name("anti-affinity class", &class.class)?;
        }
        for before in &policy.start_after {
            if before != name {
                self.need_group(before)?;
            }
        }
        self.check_start_order(name, policy)
    }

    fn check_start_order(&self, name: &str, policy: &GroupPolicy) -> Result<(), Refused> {
        let names = |list: &'_ [String]| -> BTreeSet<String> { list.iter().cloned().collect() };
        let mut order: BTreeMap<String, BTreeSet<String>> = self
            .groups
            .values()
            .map(|group| (group.name.clone(), names(&group.policy.start_after)))
            .collect();
        order.insert(name.into(), names(&policy.start_after));
        let order = order
            .iter()
            .map(|(name, after)| (name.as_str(), after.iter().map(String::as_str).collect()))
            .collect();
        match expr::cycle(&order) {
            None => Ok(()),
            Some(way) => Err(Refused::Invalid(format!(
                "groups cannot start after each other in a circle: {}",
                way.join(" after ")
            ))),
        }
    }

    pub(super) fn check_nodes_once(&self, what: &str, nodes: &[NodeId]) -> Result<(), Refused> {
        let mut seen = BTreeSet::new();
        for &id in nodes {
            let name = &self.need_node(id)?.name;
            if !seen.insert(id) {
                return Err(Refused::Invalid(format!("{name} stands twice among the {what}")));
            }
        }
        Ok(())
    }

    fn group_add(&mut self, at: At, name: &str, policy: &GroupPolicy) -> Answer {
        check_name("group", name)?;
        if self.groups.contains_key(name) {
            return Err(Refused::Duplicate { what: "group".into(), name: name.into(), hint: String::new() });
        }
        self.check_policy(name, policy)?;
        self.room_for_group(name, policy)?;
        self.groups.insert(name.into(), Group::new(name, policy.clone(), at));
        self.emit(at, EventKind::GroupAdded, None, name, format!("group {name} was added"));
        done()
    }

    fn group_policy(&mut self, at: At, name: &str, policy: &GroupPolicy) -> Answer {
        if self.need_group(name)?.policy == *policy {
            return unchanged();
        }
        self.check_policy(name, policy)?;
        self.room_for_group(name, policy)?;
        if let Some(group) = self.groups.get_mut(name) {
            group.policy = policy.clone();
        }
        self.emit(at, EventKind::GroupChanged, None, name, format!("the policy of group {name} was changed"));
        done()
    }

    fn group_remove(&mut self, at: At, name: &str) -> Answer {
        let group = self.need_group(name)?;
        if let Some(resource) = self.resources.values().find(|resource| resource.group == name) {
            return Err(Refused::Invalid(format!(
                "group {name} has resource {}: remove its resources first",
                resource.name
            )));
        }
        if group.owner.is_some() {
            let why = format!("take it offline first with `csvctl group offline {name}`");
            return Err(Self::group_state(group, &why));
        }
        if let Some(other) =
            self.groups.values().find(|other| other.policy.start_after.iter().any(|g| g == name))
        {
            return Err(Refused::Invalid(format!("group {} starts after it: change that first", other.name)));
        }
        self.groups.remove(name);
        self.emit(at, EventKind::GroupRemoved, None, name, format!("group {name} was removed"));
        done()
    }

    fn group_online(&mut self, at: At, name: &str) -> Answer {
        let group = self.need_group(name)?;
        let has_failed = |resource: &super::super::Resource| {
            resource.group == name && resource.want_online && resource.status.state == ResourceState::Failed
        };
        let fresh = group.failures.is_empty()
            && group.given_up.is_none()
            && group.failovers.is_empty()
            && !self.resources.values().any(has_failed);
        let stays =
            self.group_owner_stands(group) && !matches!(group.state, GroupState::Releasing { to: None, .. });
        if group.want_online && fresh && (stays || group.ordered_unix_ms.is_some()) {
            return unchanged();
        }
        let Some(group) = self.groups.get_mut(name) else { return unchanged() };
        group.want_online = true;
        if !stays {
            group.ordered_unix_ms = Some(at);
        }
        forget_failures(group);
        group.failovers.clear();
        for resource in self.resources.values_mut().filter(|resource| has_failed(resource)) {
            resource.wanted_unix_ms = Some(at);
        }
        self.emit(at, EventKind::GroupWanted, None, name, format!("group {name} is to be online"));
        done()
    }

    fn group_offline(&mut self, at: At, name: &str, reason: &str) -> Answer {
        if !self.need_group(name)?.want_online {
            return unchanged();
        }
        let Some(group) = self.groups.get_mut(name) else { return unchanged() };
        group.want_online = false;
        group.ordered_unix_ms = None;
        self.emit(
            at,
            EventKind::GroupNotWanted,
            None,
            name,
            format!("group {name} is to be offline: {reason}"),
        );
        done()
    }

    fn group_maintenance(&mut self, at: At, name: &str, on: bool) -> Answer {
        if self.need_group(name)?.maintenance == on {
            return unchanged();
        }
        let Some(group) = self.groups.get_mut(name) else { return unchanged() };
        group.maintenance = on;
        let message = format!("maintenance of group {name} {}", if on { "begins" } else { "ends" });
        self.emit(at, EventKind::GroupMaintenance, None, name, message);
        done()
    }

    /// May the node be given the group, as far as the database alone can tell?
    fn check_group_target(&self, at: At, group: &Group, to: NodeId) -> Result<u64, Refused> {
        let node = self.need_node(to)?;
        if !node.takes_volumes() {
            return Err(Self::node_state(node, at, "it cannot be given a group; choose a node that is Up"));
        }
        for resource in self.resources.values().filter(|resource| resource.group == group.name) {
            if !resource.possible.is_empty() && !resource.possible.contains(&to) {
                return Err(Refused::Invalid(format!(
                    "{} is no possible owner of resource {} of group {}",
                    node.name, resource.name, group.name
                )));
            }
        }
        Ok(node.incarnation)
    }

    /// Makes `to` the owner under the next generation. The caller has checked it.
    fn give_group(&mut self, at: At, name: &str, to: NodeId, incarnation: u64) {
        let Some(group) = self.groups.get_mut(name) else { return };
        group.last_owner = group.owner.or(group.last_owner);
        group.generation += 1;
        group.owner = Some(to);
        group.incarnation = incarnation;
        group.state = GroupState::Pending;
        group.since_unix_ms = at;
        group.placed_unix_ms = at;
        group.ordered_unix_ms = None;
        group.given_up = None;
    }

    fn set_resources(&mut self, at: At, group: &str, state: ResourceState, why: &str) {
        for resource in self.resources.values_mut().filter(|resource| resource.group == group) {
            if resource.status.state != state {
                resource.status = ResourceStatus { state, why: why.into(), since_unix_ms: at };
            }
        }
    }

    fn group_assign(&mut self, at: At, name: &str, from: u64, to: NodeId, reason: &str) -> Answer {
        let group = self.need_generation(name, from)?;
        if !group.want_online {
            let why = format!("it is to stay offline; run `csvctl group online {name}` first");
            return Err(Self::group_state(group, &why));
        }
        if self.group_owner_stands(group) {
            let why = "its owner has it and must release it first";
            return Err(Self::group_state(group, why));
        }
        let incarnation = self.check_group_target(at, group, to)?;
        self.give_group(at, name, to, incarnation);
        if let Some(group) = self.groups.get_mut(name) {
            group.displaced = true;
        }
        self.set_resources(at, name, ResourceState::Unknown, "");
        let shown = self.node_name(to);
        let message = format!("group {name} goes to {shown}: {reason}");
        self.emit(at, EventKind::GroupAssigned, Some(to), name, message);
        done()
    }

    fn group_status(
        &mut self,
        at: At,
        (name, generation, node): (&str, u64, NodeId),
        state: Option<&GroupState>,
        resources: &BTreeMap<String, ResourceStatus>,
    ) -> Answer {
        let group = self.need_group_owner(name, generation, node)?;
        if let Some(GroupState::Offline { .. } | GroupState::Releasing { .. }) = state {
            return Err(Refused::Invalid("this state of a group is not its owner's to tell".into()));
        }
        let moving = matches!(group.state, GroupState::Releasing { .. });
        let mut changed = false;
        for (resource, status) in resources {
            changed |= self.resource_status(at, node, name, resource, status);
        }
        if let Some(state) = state.filter(|_| !moving) {
            changed |= self.group_told(at, name, node, state);
        }
        if changed { done() } else { unchanged() }
    }

    fn resource_status(
        &mut self,
        at: At,
        node: NodeId,
        group: &str,
        name: &str,
        status: &ResourceStatus,
    ) -> bool {
        let Some(resource) = self.resources.get_mut(name).filter(|resource| resource.group == group) else {
            return false;
        };
        let mut status = status.clone();
        cut(&mut status.why);
        if resource.status == status {
            return false;
        }
        let before = std::mem::replace(&mut resource.status, status).state;
        let status = resource.status.clone();
        if before == status.state {
            return true;
        }
        let because = if status.why.is_empty() { String::new() } else { format!(": {}", status.why) };
        let kind = match status.state {
            ResourceState::Online => EventKind::ResourceOnline,
            ResourceState::Failed => EventKind::ResourceFailed,
            ResourceState::Offline if before != ResourceState::Unknown => EventKind::ResourceOffline,
            ResourceState::Offline
            | ResourceState::OnlinePending
            | ResourceState::OfflinePending
            | ResourceState::Unknown => return true,
        };
        let message = format!("resource {name} is {}{because}", status.state);
        self.emit(at, kind, Some(node), name, message);
        true
    }

    /// The owner tells how the group is.
    fn group_told(&mut self, at: At, name: &str, node: NodeId, state: &GroupState) -> bool {
        let Some(group) = self.groups.get_mut(name) else { return false };
        let mut state = state.clone();
        if let GroupState::Failed { reason } | GroupState::Partial { reason } = &mut state {
            cut(reason);
        }
        if group.state == state {
            return false;
        }
        let failed_already = matches!(group.state, GroupState::Failed { .. });
        let (kind, text) = match &state {
            GroupState::Online => {
                forget_failures(group);
                (Some(EventKind::GroupOnline), String::new())
            }
            GroupState::Partial { reason } => (Some(EventKind::GroupPartial), format!(": {reason}")),
            GroupState::Failed { reason } => {
                if !failed_already {
                    group.failures.push(GroupFailure { node, at_unix_ms: at, why: reason.clone() });
                    trim(&mut group.failures);
                }
                (Some(EventKind::GroupFailed), format!(": {reason}"))
            }
            GroupState::Pending | GroupState::Offline { .. } | GroupState::Releasing { .. } => {
                (None, String::new())
            }
        };
        group.state = state;
        group.since_unix_ms = at;
        let shown = group.state.to_string();
        if let Some(kind) = kind {
            let owner = self.node_name(node);
            self.emit(at, kind, Some(node), name, format!("group {name} is {shown} on {owner}{text}"));
        }
        true
    }

    fn group_release(
        &mut self,
        at: At,
        (name, generation): (&str, u64),
        to: Option<NodeId>,
        (how, cause): (MoveKind, MoveCause),
        reason: &str,
    ) -> Answer {
        let group = self.need_generation(name, generation)?;
        match (&group.state, group.owner) {
            (GroupState::Releasing { to: already, .. }, _) if *already == to => return unchanged(),
            (GroupState::Releasing { .. }, _) => {
                return Err(Self::group_state(group, "wait until it has arrived, then move it again"));
            }
            (_, None) => {
                let why = format!("no node has it; `csvctl group online {name}` starts it");
                return Err(Self::group_state(group, &why));
            }
            (_, Some(owner)) if Some(owner) == to => {
                return Err(Self::group_state(group, &format!("{} has it already", self.node_name(owner))));
            }
            _ => {}
        }
        if let Some(to) = to {
            self.check_group_target(at, group, to)?;
        }
        let owner = group.owner;
        let goes = to.map_or_else(
            || "is taken offline".into(),
            |to| format!("goes to {} ({how})", self.node_name(to)),
        );
        let Some(group) = self.groups.get_mut(name) else { return unchanged() };
        if cause == MoveCause::Failure {
            group.failovers.push(at);
            trim(&mut group.failovers);
        }
        group.state = GroupState::Releasing { to, how, reason: reason.into(), cause };
        group.since_unix_ms = at;
        self.emit(at, EventKind::GroupMoving, owner, name, format!("group {name} {goes}: {reason}"));
        done()
    }

    fn group_released(&mut self, at: At, name: &str, generation: u64, node: NodeId) -> Answer {
        let group = self.need_group_owner(name, generation, node)?;
        let GroupState::Releasing { to, cause, .. } = &group.state else {
            return Err(Self::group_state(group, "its owner was not asked to release it"));
        };
        let (to, cause) = (*to, *cause);
        let target = to.filter(|_| group.want_online);
        let was_to_arrive = target.is_some();
        let target = target.and_then(|to| Some((to, self.check_group_target(at, group, to).ok()?)));
        self.set_resources(at, name, ResourceState::Offline, "");
        let shown = self.node_name(node);
        let message = match target {
            Some((to, incarnation)) => {
                self.give_group(at, name, to, incarnation);
                format!("group {name} was released by {shown} and goes to {}", self.node_name(to))
            }
            None => {
                self.ungive_group(at, name, &format!("{shown} released it"));
                format!("group {name} was released by {shown}")
            }
        };
        if let Some(group) = self.groups.get_mut(name) {
            group.displaced = !cause.settles();
            if was_to_arrive && group.owner.is_none() {
                group.ordered_unix_ms = Some(at);
            }
        }
        self.emit(at, EventKind::GroupReleased, Some(node), name, message);
        done()
    }

    /// Leaves the group without an owner.
    fn ungive_group(&mut self, at: At, name: &str, reason: &str) {
        let Some(group) = self.groups.get_mut(name) else { return };
        group.last_owner = group.owner.or(group.last_owner);
        group.owner = None;
        group.state = GroupState::Offline { reason: reason.into() };
        group.since_unix_ms = at;
        group.given_up = None;
    }

    fn group_migrated(&mut self, at: At, name: &str, generation: u64, node: NodeId) -> Answer {
        let group = self.need_group_owner(name, generation, node)?;
        let GroupState::Releasing { to: Some(to), cause, .. } = &group.state else {
            return Err(Self::group_state(group, "its owner was not asked to give it to another node"));
        };
        let (to, cause) = (*to, *cause);
        let (from, shown) = (self.node_name(node), self.node_name(to));
        let there = self.nodes.get(&to).filter(|node| node.is_up()).map(|node| node.incarnation);
        let Some(incarnation) = there else {
            // The owner has the guests still, and takes them back.
            return Err(Self::group_state(group, &format!("{shown}, which it was to go to, is down")));
        };
        self.give_group(at, name, to, incarnation);
        if let Some(group) = self.groups.get_mut(name) {
            group.displaced = !cause.settles();
        }
        let message = format!("group {name} went from {from} to {shown} while it ran");
        self.emit(at, EventKind::GroupMigrated, Some(to), name, message);
        done()
    }

    fn group_release_cancelled(
        &mut self,
        at: At,
        (name, generation, node): (&str, u64, NodeId),
        reason: &str,
    ) -> Answer {
        let group = self.need_group_owner(name, generation, node)?;
        if !matches!(group.state, GroupState::Releasing { .. }) {
            return unchanged();
        }
        let online = |resource: &super::super::Resource| {
            resource.group != name || !resource.want_online || resource.status.state == ResourceState::Online
        };
        let state =
            if self.resources.values().all(online) { GroupState::Online } else { GroupState::Pending };
        let Some(group) = self.groups.get_mut(name) else { return unchanged() };
        group.state = state;
        group.since_unix_ms = at;
        let shown = self.node_name(node);
        let message = format!("group {name} stays on {shown}: {reason}");
        self.emit(at, EventKind::GroupMoveCancelled, Some(node), name, message);
        done()
    }

    fn group_unplaced(&mut self, at: At, name: &str, from: u64, reason: &str) -> Answer {
        let group = self.need_generation(name, from)?;
        if self.group_owner_stands(group) {
            return Err(Self::group_state(group, "its owner has it and must release it first"));
        }
        if matches!(&group.state, GroupState::Offline { reason: already } if already == reason) {
            return unchanged();
        }
        let owner = group.owner;
        let wanted = group.want_online;
        self.ungive_group(at, name, reason);
        self.set_resources(at, name, ResourceState::Offline, "");
        let kind = if wanted { EventKind::GroupUnplaced } else { EventKind::GroupReleased };
        self.emit(at, kind, owner, name, format!("group {name} has no owner: {reason}"));
        done()
    }

    fn group_give_up(&mut self, at: At, name: &str, generation: u64, reason: &str) -> Answer {
        let group = self.need_generation(name, generation)?;
        if !matches!(group.state, GroupState::Failed { .. }) {
            return Err(Self::group_state(group, "it has not failed"));
        }
        if group.given_up.as_deref() == Some(reason) {
            return unchanged();
        }
        let owner = group.owner;
        let Some(group) = self.groups.get_mut(name) else { return unchanged() };
        group.given_up = Some(reason.into());
        self.emit(at, EventKind::GroupGivenUp, owner, name, format!("group {name} stays failed: {reason}"));
        done()
    }

    /// A node goes out of every record; `heir` gets its rank.
    pub(super) fn remove_node_from_groups(&mut self, id: NodeId, heir: Option<NodeId>) {
        let replace = |nodes: &mut Vec<NodeId>| match heir {
            Some(heir) => nodes.iter_mut().filter(|node| **node == id).for_each(|node| *node = heir),
            None => nodes.retain(|node| *node != id),
        };
        for group in self.groups.values_mut() {
            replace(&mut group.policy.preferred);
            group.failures.retain(|failure| failure.node != id);
            group.last_owner = group.last_owner.filter(|node| *node != id);
            if group.owner == Some(id) {
                group.owner = None;
                group.state = GroupState::Offline { reason: "its owner was removed from the cluster".into() };
            }
            if let GroupState::Releasing { to, .. } = &mut group.state {
                *to = to.filter(|node| *node != id);
            }
        }
        for resource in self.resources.values_mut() {
            let only = resource.possible == [id];
            replace(&mut resource.possible);
            if only && heir.is_none() {
                // Empty would mean every node.
                resource.possible = vec![id];
            }
        }
    }

    /// Nobody has a group, and what a former owner says is refused.
    pub(super) fn reset_groups(&mut self, at: At, generations: u64, reason: &str) {
        let names: Vec<String> = self.groups.keys().cloned().collect();
        for name in names {
            self.ungive_group(at, &name, reason);
            self.set_resources(at, &name, ResourceState::Offline, "");
            if let Some(group) = self.groups.get_mut(&name) {
                group.generation = group.generation.saturating_add(generations);
            }
        }
    }
}

fn forget_failures(group: &mut Group) {
    group.failures.clear();
    group.given_up = None;
}

fn trim<T>(list: &mut Vec<T>) {
    let over = list.len().saturating_sub(GROUP_FAILURES_MAX);
    list.drain(..over);
}

fn cut(text: &mut String) {
    let mut end = text.len().min(WHY_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}
