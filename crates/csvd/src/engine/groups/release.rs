//! A group leaves this node, by order of the database: how its virtual machines go, and what is begun for that.
//!
//! * Shutdown: everything is taken offline in good order.
//! * Quick: the same, but virtual machines are saved.
//! * Live: what runs moves by a task of its own ([`super::migrate`]), while the group is looked after as always. Where that cannot
//!   be (something that is neither a virtual machine nor on several nodes at once is in the group), Quick.
//!
//! A live move that failed is not begun again at once by the engine's own wish; a node that is about to stop does not wait for
//! another try, its machines are saved.

use super::driver::Driver;
use super::incoming::MACHINE;
use super::spec::is_shared;
use super::{Asker, migrate};
use csv_cluster::db::{EventKind, GroupState, MoveCause, MoveKind, ResourceState};
use csv_cluster::groups::local::{Config, Input};
use csv_resource::protocol::Entry;
use csv_types::NodeId;
use csvd::groups::MoveProgress;
use serde_json::json;
use std::time::{Duration, Instant};

/// After a live move failed, before the engine begins another one by itself.
const AGAIN: Duration = Duration::from_secs(30);

/// Virtual machines of a group that can move while they run, or why the group cannot.
fn machines(config: &Config) -> Result<Vec<String>, String> {
    let mut machines = Vec::new();
    for (name, resource) in &config.resources {
        let online = resource.status.state == ResourceState::Online;
        if resource.kind == MACHINE && online {
            machines.push(name.clone());
        } else if is_shared(&resource.kind) || resource.status.state == ResourceState::Offline {
            // It is brought online there, or is not online here.
        } else if resource.kind == MACHINE {
            return Err(format!("virtual machine {name} is {}", resource.status.state));
        } else {
            return Err(format!(
                "resource {name} ({}) can be on one node only, and the machines depend on what is in their group",
                resource.kind
            ));
        }
    }
    if machines.is_empty() { Err("no virtual machine of it is online".to_owned()) } else { Ok(machines) }
}

impl Driver {
    /// Begins what the database wants, once per order.
    pub(super) fn give_away(&mut self, name: &str) {
        let Some(driven) = self.driven.get(name) else { return };
        let Some(config) = driven.config.clone() else { return };
        let GroupState::Releasing { to, how, cause, .. } = config.group.state.clone() else {
            if let Some(driven) = self.driven.get_mut(name) {
                driven.leaving = None;
            }
            return;
        };
        // One order may come right behind another that was given up.
        let order = config.group.since_unix_ms;
        if driven.leaving == Some(order) {
            return;
        }
        let has_machines = config.resources.values().any(|resource| resource.kind == MACHINE);
        let live = match (to, how) {
            (Some(to), MoveKind::Live) if has_machines => Some((to, machines(&config))),
            (Some(_) | None, MoveKind::Live | MoveKind::Quick | MoveKind::Shutdown) => None,
        };
        match live {
            Some((to, Ok(machines))) if !self.gave_up_lately(name, cause) => {
                self.go_live(&config, to, machines)
            }
            // It is tried again when its time has come.
            Some((_, Ok(_))) if !self.is_stopping_node() => return,
            Some((to, Ok(_) | Err(_))) => {
                if let Some((_, Err(why))) = &live {
                    let text = format!(
                        "group {name} cannot go while it runs: {why}; its machines are saved and resumed"
                    );
                    self.event(name, EventKind::ResourceNote, text);
                }
                self.go_offline(&config, Some(to), MoveKind::Quick);
            }
            None => self.go_offline(&config, to, how),
        }
        if let Some(driven) = self.driven.get_mut(name) {
            driven.leaving = Some(order);
        }
    }

    fn gave_up_lately(&self, name: &str, cause: MoveCause) -> bool {
        cause != MoveCause::Order && self.moves_failed.get(name).is_some_and(|at| at.elapsed() < AGAIN)
    }

    fn is_stopping_node(&self) -> bool {
        self.engine.db.read().nodes.get(&self.engine.me()).is_some_and(|node| node.leaving)
    }

    /// Does a group wait for another try whose time has come?
    pub(super) fn waits_to_move(&mut self) -> bool {
        let before = self.moves_failed.len();
        self.moves_failed.retain(|_, at| at.elapsed() < AGAIN);
        before != self.moves_failed.len()
    }

    fn go_live(&mut self, config: &Config, to: NodeId, machines: Vec<String>) {
        let order = migrate::Order {
            group: config.group.name.clone(),
            generation: config.group.generation,
            to,
            machines,
        };
        self.engine.runtime.spawn(migrate::run(self.engine.clone(), order));
    }

    fn go_offline(&mut self, config: &Config, to: Option<NodeId>, how: MoveKind) {
        if to.is_some() && how == MoveKind::Quick {
            let machines = config.resources.values().filter(|resource| {
                resource.kind == MACHINE && resource.status.state == ResourceState::Online
            });
            for machine in machines {
                let (verb, arguments) = ("save".to_owned(), json!({}));
                // In the queue before going offline; where it cannot be saved it is shut down.
                self.hosts.call(&machine.name, Entry::Control { verb, arguments }, Asker::Nobody);
            }
        }
        self.feed(&config.group.name, Input::Release);
    }

    pub(super) fn move_ended(&mut self, group: &str, generation: u64, failed: bool) {
        self.engine.groups.moving.lock().remove(group);
        let current = self.driven.get(group).is_some_and(|driven| driven.local.generation() == generation);
        if failed && current {
            self.moves_failed.insert(group.to_owned(), Instant::now());
        } else {
            self.moves_failed.remove(group);
        }
    }

    /// A virtual machine tells how far it is.
    pub(super) fn move_progress(&self, resource: &str, text: String) {
        let mut moving = self.engine.groups.moving.lock();
        if let Some(progress) = moving.values_mut().find(|progress| progress.resource == resource) {
            *progress = MoveProgress { resource: resource.to_owned(), percent: percent_in(&text), text };
        }
    }
}

/// The number before the first per cent sign.
fn percent_in(text: &str) -> Option<u8> {
    let before = text.split_once('%')?.0.trim_end();
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_cluster::db::{Group, GroupPolicy, Resource, ResourceStatus};

    fn config(resources: &[(&str, &str, ResourceState)]) -> Config {
        let resource = |(name, kind, state): &(&str, &str, ResourceState)| {
            let status = ResourceStatus { state: *state, ..ResourceStatus::default() };
            let (name, kind) = ((*name).to_owned(), (*kind).to_owned());
            (name.clone(), Resource { name, kind, status, ..Resource::default() })
        };
        let resources = resources.iter().map(resource).collect();
        Config { group: Group::new("g", GroupPolicy::default(), 0), resources }
    }

    #[test]
    fn only_machines_and_what_several_nodes_may_have_go_live() {
        use ResourceState::{Failed, Offline, Online};
        let ok = config(&[
            ("vm", MACHINE, Online),
            ("volume", "ClusterSharedVolume", Online),
            ("helper", "GenericApplication", Offline),
        ]);
        assert_eq!(machines(&ok), Ok(vec!["vm".to_owned()]));
        let with_address = config(&[("vm", MACHINE, Online), ("ip", "IPAddress", Online)]);
        assert!(machines(&with_address).unwrap_err().contains("ip"));
        let one_failed = config(&[("a", MACHINE, Online), ("b", MACHINE, Failed)]);
        assert!(machines(&one_failed).unwrap_err().contains('b'));
        assert!(machines(&config(&[("ip", "IPAddress", Offline)])).is_err());
    }

    #[test]
    fn how_far_it_is_stands_before_the_sign() {
        assert_eq!(percent_in("migrating: 75 %, 100 MiB left"), Some(75));
        assert_eq!(percent_in("waiting"), None);
        assert_eq!(percent_in("migrating: 300 %"), None);
    }
}
