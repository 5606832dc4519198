//! A group that is about to arrive here while it runs: its resources are open here, and its virtual machines wait for their guests,
//! before this node owns it. When it does, the owner's state machine finds them.
//!
//! Valid for as long as the database says that the group is on its way here, or is here under the next generation. What
//! was opened for a move that is given up is a leftover, and ended as such.

use super::driver::Driver;
use super::{Asker, Local, Reply};
use csv_cluster::db::{ClusterDb, GroupState, MoveKind, Resource, ResourceState};
use csv_cluster::groups::local::{Input, Outcome};
use csv_resource::protocol::{self, Entry};
use csv_types::NodeId;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// For a guest that was sent to be here whole.
const ARRIVE_MS: u64 = 30_000;
/// The type whose resources arrive running.
pub(super) const MACHINE: &str = "VirtualMachine";

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// Under which its present owner has it.
    pub(super) generation: u64,
    /// Those that no group here looks after yet.
    pub(super) resources: BTreeSet<String>,
    /// Machines whose guests stay paused.
    paused: BTreeSet<String>,
}

/// How far a virtual machine is that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Open {
        /// The guest stays paused.
        paused: bool,
    },
    /// With what was found before, if that was not that it waits.
    Arrive {
        found: Option<String>,
    },
    Online,
}

/// Is the group on its way to that node, from an ownership of that generation?
pub(super) fn comes(db: &ClusterDb, group: &str, generation: u64, to: NodeId) -> bool {
    db.groups.get(group).is_some_and(|group| {
        let releasing = matches!(&group.state, GroupState::Releasing { to: Some(node), .. } if *node == to);
        group.generation == generation && releasing
    })
}

fn has_come(db: &ClusterDb, group: &str, generation: u64, to: NodeId) -> bool {
    db.groups.get(group).is_some_and(|group| group.generation == generation + 1 && group.owner == Some(to))
}

impl Driver {
    pub(super) fn expect(&mut self, group: String, generation: u64, paused: Option<String>, reply: Reply) {
        let resources: Option<BTreeSet<String>> = {
            let db = self.engine.db.read();
            let names = db.resources.values().filter(|of| of.group == group).map(|of| of.name.clone());
            comes(&db, &group, generation, self.engine.me()).then(|| names.collect())
        };
        let answer = match resources {
            None => Err(format!("group {group} is not on its way to this node")),
            Some(_) if self.driven.contains_key(&group) => {
                Err(format!("this node still ends what it had of group {group} before"))
            }
            Some(resources) => {
                for resource in &resources {
                    self.leftovers.spare(resource);
                }
                let incoming = self.incoming.entry(group).or_default();
                if incoming.generation != generation {
                    *incoming = Incoming { generation, ..Incoming::default() };
                }
                incoming.resources.extend(resources);
                incoming.paused.extend(paused);
                Ok(Value::Null)
            }
        };
        let _gone = reply.send(answer);
    }

    pub(super) fn unexpect(&mut self, group: &str, generation: u64) {
        if self.incoming.get(group).is_some_and(|incoming| incoming.generation == generation) {
            self.incoming.remove(group);
        }
    }

    /// Forgets moves that were given up.
    pub(super) fn check_incoming(&mut self) {
        let me = self.engine.me();
        let db = self.engine.db.read();
        self.incoming.retain(|group, incoming| {
            let generation = incoming.generation;
            comes(&db, group, generation, me) || has_come(&db, group, generation, me)
        });
    }

    /// Moves to this node that an earlier csvd got ready for.
    pub(super) fn find_incoming(&mut self) {
        let me = self.engine.me();
        let db = self.engine.db.read();
        for (name, group) in &db.groups {
            let live = matches!(&group.state, GroupState::Releasing { to: Some(to), how: MoveKind::Live, .. } if *to == me);
            if !live || self.driven.contains_key(name) || self.incoming.contains_key(name) {
                continue;
            }
            let of_group =
                db.resources.values().filter(|of| of.group == *name && self.hosts.is_open(&of.name));
            let resources: BTreeSet<String> = of_group.map(|of| of.name.clone()).collect();
            if !resources.is_empty() {
                let generation = group.generation;
                let incoming = Incoming { generation, resources, ..Incoming::default() };
                self.incoming.insert(name.clone(), incoming);
            }
        }
    }

    /// A machine that was online elsewhere, as the database has it, is not online here: its guest may have arrived, and
    /// wait since a csvd or a host before this one ended.
    pub(super) fn arrived_before(&mut self, local: &Local, resource: &str, found: &str) -> bool {
        let config = self.driven.get(&local.group).and_then(|driven| driven.config.as_ref());
        let was_online = |of: &Resource| of.kind == MACHINE && of.status.state == ResourceState::Online;
        if !config.is_some_and(|config| config.resources.get(resource).is_some_and(was_online)) {
            return false;
        }
        let (verb, arguments) = ("arrived".to_owned(), json!({ "wait_ms": ARRIVE_MS }));
        let asker = Asker::Arrival(local.clone(), Step::Arrive { found: Some(found.to_owned()) });
        self.hosts.call(resource, Entry::Control { verb, arguments }, asker);
        true
    }

    /// A group that is here now opens a resource: is it a machine whose guest waits to go on? Only as long as the database has it
    /// online, as a move leaves it: when the group has been assigned anew, what its guest's memory knows of the disks is old.
    pub(super) fn arrives(&mut self, group: &str, resource: &str) -> Option<Step> {
        let driven = self.driven.get(group);
        let generation = driven.map(|driven| driven.local.generation());
        let machine = driven
            .and_then(|driven| driven.config.as_ref())
            .and_then(|config| config.resources.get(resource))
            .is_some_and(|of| of.kind == MACHINE && of.status.state == ResourceState::Online);
        let incoming = self.incoming.get_mut(group)?;
        let waits = generation == Some(incoming.generation + 1)
            && incoming.resources.remove(resource)
            && self.hosts.is_open(resource);
        let paused = incoming.paused.contains(resource);
        if incoming.resources.is_empty() {
            self.incoming.remove(group);
        }
        (waits && machine).then_some(Step::Open { paused })
    }

    pub(super) fn arrival(&mut self, local: Local, resource: &str, step: Step, outcome: protocol::Outcome) {
        let call = local.call;
        let name = resource.to_owned();
        let input = match (step, outcome) {
            (Step::Open { paused }, protocol::Outcome::Done(_)) => {
                let arguments = json!({ "wait_ms": ARRIVE_MS, "paused": paused });
                let verb = "arrived".to_owned();
                let asker = Asker::Arrival(local, Step::Arrive { found: None });
                return self.hosts.call(resource, Entry::Control { verb, arguments }, asker);
            }
            (Step::Arrive { .. }, protocol::Outcome::Done(_)) => {
                return self.hosts.call(resource, Entry::Online, Asker::Arrival(local, Step::Online));
            }
            (Step::Online, protocol::Outcome::Done(_)) => {
                Input::Found { resource: name, call, online: true, why: String::new() }
            }
            (Step::Open { .. }, protocol::Outcome::Failed { why, retry, elsewhere }) => {
                let outcome = Outcome::Failed { why, retry, elsewhere };
                Input::Answer { resource: name, call, outcome }
            }
            (Step::Arrive { found: Some(why) }, protocol::Outcome::Failed { .. })
            | (Step::Arrive { found: None } | Step::Online, protocol::Outcome::Failed { why, .. }) => {
                Input::Found { resource: name, call, online: false, why }
            }
        };
        self.later(&local, input);
    }
}
