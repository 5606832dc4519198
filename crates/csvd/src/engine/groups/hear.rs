//! What hosts say, and that they say nothing more, goes to the groups.

use super::driver::{Driven, Driver};
use super::hosts::{self, Call, HostId, Lost};
use super::{Asker, Doing, Local, checkpoints};
use csv_cluster::db::EventKind;
use csv_cluster::groups::local::{Input, Outcome};
use csv_resource::api::EventLevel;
use csv_resource::protocol::{self, Found, FromHost, Stuck};
use std::collections::{BTreeMap, BTreeSet};

impl Driver {
    /// Calls that failed before anybody heard of them.
    pub(super) fn answer_failed(&mut self) {
        while let Some(failed) = self.hosts.failed.pop_front() {
            match failed.asker {
                // It should be open, and is not: it is opened again. (Nothing is left to be closed.)
                Asker::Local(local, Doing::Online | Doing::Offline | Doing::Terminate) => {
                    let resources = vec![failed.resource];
                    self.later(&local, Input::HostGone { resources, why: failed.why, culprit: None });
                }
                asker @ (Asker::Local(..)
                | Asker::Arrival(..)
                | Asker::Leftover(_)
                | Asker::Outside(_)
                | Asker::Nobody) => self.answered(&failed.resource, asker, hosts::failed(failed.why)),
            }
        }
    }

    pub(super) fn hear(&mut self, id: HostId, said: FromHost) {
        self.hosts.heard(id);
        match said {
            FromHost::Welcome { .. } => {}
            FromHost::Beat { stuck } => {
                // The host is killed for the first; the others are looked at in their next one.
                if let Some(stuck) = stuck.into_iter().next() {
                    self.hung(&stuck);
                }
            }
            FromHost::Answer { call, outcome, .. } => {
                if let Some(Call { resource, asker, .. }) = self.hosts.answered(call, &outcome) {
                    self.answered(&resource, asker, outcome);
                }
            }
            FromHost::Progress { call, name, text } => self.progress(call, name, text),
            FromHost::Failed { name, why } => self.failed(&name, why),
            FromHost::LeaseOver { left } => self.lease_over(id, &left),
            FromHost::Event { name, level, text } => {
                let kind = match level {
                    EventLevel::Info => EventKind::ResourceNote,
                    EventLevel::Warning | EventLevel::Error => EventKind::ResourceWarning,
                };
                let text = if name.is_empty() { text } else { format!("resource {name}: {text}") };
                self.event(&name, kind, text);
            }
        }
    }

    fn answered(&mut self, resource: &str, asker: Asker, outcome: protocol::Outcome) {
        match asker {
            Asker::Local(local, doing) => self.answer_local(&local, resource, doing, outcome),
            Asker::Arrival(local, step) => self.arrival(local, resource, step, outcome),
            Asker::Leftover(step) => self.leftover_answered(resource, step, &outcome),
            Asker::Outside(reply) => {
                let _gone = reply.send(match outcome {
                    protocol::Outcome::Done(value) => Ok(value),
                    protocol::Outcome::Failed { why, .. } => Err(why),
                });
            }
            Asker::Nobody => {}
        }
    }

    fn answer_local(&mut self, local: &Local, resource: &str, doing: Doing, outcome: protocol::Outcome) {
        let call = local.call;
        let name = resource.to_owned();
        if doing == Doing::Close {
            self.hosts.left(resource);
        }
        let input = match (doing, outcome) {
            (Doing::Adopt, protocol::Outcome::Done(value)) => {
                let found: Found = serde_json::from_value(value).unwrap_or_else(|error| Found {
                    online: false,
                    why: format!("its resource host answers what is not understood: {error}"),
                });
                if !found.online && self.arrived_before(local, resource, &found.why) {
                    return;
                }
                Input::Found { resource: name, call, online: found.online, why: found.why }
            }
            (_, protocol::Outcome::Done(_)) => Input::Answer { resource: name, call, outcome: Outcome::Done },
            (_, protocol::Outcome::Failed { why, retry, elsewhere }) => {
                let outcome = Outcome::Failed { why, retry, elsewhere };
                Input::Answer { resource: name, call, outcome }
            }
        };
        if doing == Doing::Offline && self.saves(local, resource) {
            let files = self.files(&local.group, resource);
            return checkpoints::save_before(&self.engine, local, resource, files, input);
        }
        self.later(local, input);
    }

    fn files(&self, group: &str, resource: &str) -> Vec<String> {
        let config = self.driven.get(group).and_then(|driven| driven.config.as_ref());
        config
            .and_then(|config| config.resources.get(resource))
            .map_or_else(Vec::new, |of| of.checkpoints.clone())
    }

    fn saves(&self, local: &Local, resource: &str) -> bool {
        let owned = self.driven.get(&local.group).is_some_and(|driven| !driven.stopped);
        owned && !self.files(&local.group, resource).is_empty()
    }

    fn progress(&mut self, call: u64, resource: String, text: String) {
        match self.hosts.asker(call).map(|call| &call.asker) {
            Some(Asker::Local(local, _)) => {
                let (local, call) = (local.clone(), local.call);
                self.later(&local, Input::Progress { resource, call, text });
            }
            Some(Asker::Outside(_)) => self.move_progress(&resource, text),
            Some(Asker::Arrival(..) | Asker::Leftover(_) | Asker::Nobody) | None => {}
        }
    }

    /// Groups that look after a resource of that name: its own, and one that it was in before and that has yet to close it.
    fn groups_of(&self, resource: &str) -> Vec<(String, u64)> {
        let with = self.driven.iter().filter(|(_, driven)| driven.local.has(resource));
        with.map(|(name, driven)| (name.clone(), driven.local.generation())).collect()
    }

    /// The group that has the resource in its list.
    fn group_of(&self, resource: &str) -> Option<(String, u64)> {
        let has = |driven: &Driven| {
            driven.config.as_ref().is_some_and(|config| config.resources.contains_key(resource))
        };
        let found = self.driven.iter().find(|(_, driven)| has(driven));
        found.map(|(name, driven)| (name.clone(), driven.local.generation()))
    }

    fn failed(&mut self, resource: &str, why: String) {
        if let Some((group, generation)) = self.group_of(resource) {
            let input = Input::Failed { resource: resource.to_owned(), why };
            self.later(&Local { group, generation, call: 0 }, input);
        }
    }

    /// The host has ended everything, since it was not told for too long that it may go on. This csvd stood still, or was away.
    fn lease_over(&mut self, id: HostId, left: &[(String, String)]) {
        for (resource, why) in left {
            let text =
                format!("resource {resource} could not be ended when this node was out of contact: {why}");
            self.event(resource, EventKind::ResourceWarning, text);
        }
        let of_host = self.hosts.resources_of(id);
        let why = "its resource host ended it, since csvd did not tell it in time that it may go on";
        self.tell_gone(&of_host, why, None, false, &[]);
    }

    /// Tells all groups that have something among these that nothing is known of it any more, but those that were told.
    fn tell_gone(
        &mut self,
        resources: &BTreeSet<String>,
        why: &str,
        culprit: Option<&str>,
        stopped_too: bool,
        told: &[(String, u64)],
    ) {
        let mut by_group: BTreeMap<(String, u64), Vec<String>> = BTreeMap::new();
        for resource in resources {
            for group in self.groups_of(resource).into_iter().filter(|group| !told.contains(group)) {
                by_group.entry(group).or_default().push(resource.clone());
            }
        }
        for ((group, generation), resources) in by_group {
            if !stopped_too && self.driven.get(&group).is_none_or(|driven| driven.stopped) {
                continue;
            }
            let input =
                Input::HostGone { resources, why: why.to_owned(), culprit: culprit.map(str::to_owned) };
            self.later(&Local { group, generation, call: 0 }, input);
        }
    }

    /// A host is gone, or given up.
    pub(super) fn lose(&mut self, id: HostId, why: &str) {
        let Some(mut lost) = self.hosts.remove(id) else { return };
        if lost.culprit.is_none() {
            lost.culprit = self.hosts.died_again(&lost);
        }
        if !lost.resources.is_empty() {
            let what = match &lost.culprit {
                Some(culprit) => format!(", while resource {culprit} was at work"),
                None => String::new(),
            };
            let text = format!(
                "resource host {} ended{what}: {why}; what it looked after is taken over by another one",
                lost.name
            );
            self.event(lost.culprit.as_deref().unwrap_or(""), EventKind::ResourceHostEnded, text);
        }
        self.forget_calls(&lost, why);
        self.tell_gone(&lost.resources, why, lost.culprit.as_deref(), true, &[]);
    }

    /// Those of groups are told in one word with the rest.
    fn forget_calls(&mut self, lost: &Lost, why: &str) {
        for resource in &lost.resources {
            self.leftovers.lost(resource);
        }
        tracing::info!(
            host = lost.name,
            calls = lost.calls.len(),
            why,
            "calls are lost with their resource host"
        );
    }

    fn hung(&mut self, stuck: &Stuck) {
        let Some((id, neighbours)) = self.hosts.neighbours(&stuck.name) else { return };
        let why = format!("{} has not returned for {} s", stuck.entry, stuck.for_ms / 1000);
        let Some(lost) = self.hosts.remove(id) else { return };
        self.forget_calls(&lost, &why);
        let hanging: Vec<(String, u64)> = self.groups_of(&stuck.name);
        if hanging.is_empty() {
            let text = format!("resource {} hangs, and its host is ended: {why}", stuck.name);
            self.event(&stuck.name, EventKind::ResourceHung, text);
        }
        for (group, generation) in &hanging {
            let of_group =
                |name: &&String| self.driven.get(group).is_some_and(|driven| driven.local.has(name.as_str()));
            let resources = neighbours.iter().filter(of_group).cloned().collect();
            let input = Input::Hung { resource: stuck.name.clone(), resources, why: why.clone() };
            self.later(&Local { group: group.clone(), generation: *generation, call: 0 }, input);
        }
        let why = format!("its resource host was ended, since resource {} hung in it", stuck.name);
        self.tell_gone(&neighbours, &why, Some(&stuck.name), true, &hanging);
    }
}
