//! The invariants of the database, for tests, the simulation, and for a snapshot before it is taken.

use super::key::{GENERATION_MAX, NODE_ID_MAX};
use super::volume::{MemberState, Volume, VolumeState};
use super::{ClusterDb, Group, GroupState, NODES_MAX, Resource, VOLUMES_MAX};
use crate::groups::expr::Expr;
use csv_types::NodeId;
use std::collections::BTreeSet;

fn ensure(holds: bool, broken: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken()) }
}

impl ClusterDb {
    /// Checks every invariant that one state can show.
    ///
    /// # Errors
    /// The first that does not hold, in words.
    pub fn check(&self) -> Result<(), String> {
        if !self.initialised() {
            return ensure(self.nodes.is_empty() && self.volumes.is_empty(), || {
                "there are records without a cluster".into()
            });
        }
        self.check_nodes()?;
        ensure(self.volumes.len() <= VOLUMES_MAX, || "too many volumes".into())?;
        let ids: BTreeSet<_> = self.volumes.values().map(|volume| volume.id).collect();
        ensure(ids.len() == self.volumes.len(), || "two volumes have the same id".into())?;
        for (name, volume) in &self.volumes {
            ensure(*name == volume.name, || format!("volume {name} is called {}", volume.name))?;
            self.check_volume(volume).map_err(|broken| format!("volume {name}: {broken}"))?;
        }
        for (name, group) in &self.groups {
            self.check_group(name, group).map_err(|broken| format!("group {name}: {broken}"))?;
        }
        for (name, resource) in &self.resources {
            self.check_resource_record(name, resource)
                .map_err(|broken| format!("resource {name}: {broken}"))?;
        }
        self.check_events()
    }

    fn check_group(&self, name: &str, group: &Group) -> Result<(), String> {
        ensure(*name == group.name, || format!("it is called {}", group.name))?;
        ensure(group.owner.is_some() == group.state.owned(), || {
            format!("it is {} and its owner is {:?}", group.state, group.owner)
        })?;
        let known = |id: &NodeId| self.nodes.contains_key(id);
        ensure(group.owner.is_none_or(|owner| known(&owner)), || "its owner is no node".into())?;
        ensure(group.policy.preferred.iter().all(known), || "a preferred owner is no node".into())?;
        if let GroupState::Releasing { to, .. } = &group.state {
            ensure(to.is_none() || *to != group.owner, || "it is released to its owner".into())?;
        }
        ensure(group.policy.start_after.iter().all(|before| self.groups.contains_key(before)), || {
            "it starts after a group that is not there".into()
        })
    }

    fn check_resource_record(&self, name: &str, resource: &Resource) -> Result<(), String> {
        ensure(*name == resource.name, || format!("it is called {}", resource.name))?;
        ensure(self.groups.contains_key(&resource.group), || "its group is not there".into())?;
        let depends = Expr::parse(&resource.depends).map_err(|error| error.to_string())?;
        let there =
            |other: &&str| self.resources.get(*other).is_some_and(|other| other.group == resource.group);
        ensure(depends.names().iter().all(there), || "it depends on something that is not there".into())
    }

    fn check_nodes(&self) -> Result<(), String> {
        ensure(!self.nodes.is_empty(), || "no node is left".into())?;
        ensure(self.nodes.len() <= NODES_MAX, || "too many nodes".into())?;
        let names: BTreeSet<_> = self.nodes.values().map(|node| &node.name).collect();
        ensure(names.len() == self.nodes.len(), || "two nodes have the same name".into())?;
        let addrs: BTreeSet<_> = self.nodes.values().map(|node| node.addr).collect();
        ensure(addrs.len() == self.nodes.len(), || "two nodes have the same address".into())?;
        for (id, node) in &self.nodes {
            ensure(node.id == *id, || format!("node {id} has number {}", node.id))?;
            ensure((1..=NODE_ID_MAX).contains(&id.0) && id.0 < self.next_node_id, || {
                format!("node number {} was never given out", id.0)
            })?;
            ensure(node.feature_level >= self.feature_level, || {
                format!("{} does not know the cluster's feature level", node.name)
            })?;
            ensure(!node.is_up() || node.incarnation > 0, || {
                format!("{} is up without incarnation", node.name)
            })?;
        }
        ensure(self.nodes.values().any(|node| node.vote), || "no node has a vote".into())
    }

    fn check_volume(&self, volume: &Volume) -> Result<(), String> {
        ensure(volume.owner.is_some() == volume.state.owned(), || {
            format!("it is {} and its owner is {:?}", volume.state, volume.owner)
        })?;
        for (id, member) in &volume.members {
            ensure((1..=GENERATION_MAX).contains(&member.generation), || {
                format!("{id} has a bad generation")
            })?;
            match self.nodes.get(id) {
                None => ensure(member.state == MemberState::FencePending, || {
                    format!("member {id} is no node and not to be fenced")
                })?,
                Some(node) => {
                    ensure(member.incarnation <= node.incarnation, || format!("{id} comes from the future"))?;
                    let may_write = member.state == MemberState::Admitted;
                    let current = member.incarnation == node.incarnation;
                    ensure(!may_write || current, || format!("{id} may write in an old incarnation"))?;
                    let given_up = matches!(node.state, super::NodeState::Down | super::NodeState::Joining);
                    ensure(!may_write || !given_up, || format!("{id} may write and is not in the cluster"))?;
                }
            }
        }
        if let Some(owner) = volume.owner {
            ensure(self.nodes.contains_key(&owner), || format!("its owner {owner} is no node"))?;
            ensure(volume.members.contains_key(&owner), || format!("its owner {owner} is no member"))?;
            ensure(volume.epoch.0 > 0, || "it has an owner in epoch 0".into())?;
        }
        if let VolumeState::Releasing { to, .. } = &volume.state {
            ensure(to.is_none() || *to != volume.owner, || "it is released to its owner".into())?;
        }
        let known = |id| self.nodes.contains_key(id);
        ensure(volume.preferred.iter().all(known), || "a preferred owner is no node".into())
    }

    fn check_events(&self) -> Result<(), String> {
        let ring = &self.events.ring;
        let first = self.events.next.saturating_sub(ring.len() as u64);
        let numbers = ring.iter().map(|event| event.number);
        ensure(numbers.eq(first..self.events.next), || "the events have gaps".into())
    }
}
