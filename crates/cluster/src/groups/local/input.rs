//! Takes in what happened.

use super::advance::Failure;
use super::unit::{Doing, Presence, Trouble, Unit, back_off};
use super::{Config, Effect, Input, LocalGroup, Mode, Outcome, PROGRESS_SHOWN_MS};
use crate::db::{EventKind, Group, GroupState, Resource};
use std::collections::{BTreeMap, BTreeSet};

impl LocalGroup {
    pub(super) fn take(&mut self, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::Config(config) => self.config(*config, out),
            Input::Found { resource, call, online, why } => self.found(&resource, call, online, why, out),
            Input::Answer { resource, call, outcome } => self.answer(&resource, call, outcome, out),
            Input::Progress { resource, call, text } => self.progress(&resource, call, text),
            Input::Failed { resource, why } => {
                let Some(unit) = self.units.get(&resource) else { return };
                let looked_after = matches!(unit.doing(), None | Some(Doing::Open));
                if unit.presence == Presence::Here && looked_after {
                    self.fail(&resource, Failure::passing(why), out);
                }
            }
            Input::HostGone { resources, why, culprit } => {
                self.host_gone(&resources, &why, culprit.as_deref(), out);
            }
            Input::Hung { resource, mut resources, why } => {
                if self.units.contains_key(&resource) {
                    let text = format!("resource {resource} hangs, and its host is ended: {why}");
                    let (kind, resource) = (EventKind::ResourceHung, resource.clone());
                    out.push(Effect::Event { kind, resource, text });
                }
                if !resources.contains(&resource) {
                    resources.push(resource.clone());
                }
                self.host_gone(&resources, &format!("it hangs: {why}"), Some(&resource), out);
            }
            Input::Release => self.leave(Mode::Release),
            Input::Stop(reason) => self.leave(Mode::Stop(reason)),
            Input::Tick => {}
        }
    }

    fn config(&mut self, config: Config, out: &mut Vec<Effect>) {
        if config.group.generation != self.generation {
            return;
        }
        let before = self.group.replace(config.group);
        let group = self.group.as_ref();
        let releasing = group.is_some_and(|group| matches!(group.state, GroupState::Releasing { .. }));
        if self.mode == Mode::Release && !releasing {
            self.mode = Mode::Run;
        }
        let afresh = before
            .as_ref()
            .zip(group)
            .is_some_and(|(before, group)| wanted_afresh(before, group, self.said_online));
        let changed = self.take_resources(&config.resources);
        self.mark_stale(&changed);
        if afresh {
            self.units.values_mut().for_each(Unit::forgive);
        }
        if before.is_some_and(|before| before.maintenance) && !self.maintenance() {
            self.end_maintenance(out);
        }
    }

    /// Returns the names of resources whose specification has changed.
    fn take_resources(&mut self, resources: &BTreeMap<String, Resource>) -> BTreeSet<String> {
        let mut changed = BTreeSet::new();
        for (name, unit) in &mut self.units {
            if !unit.removed && !resources.contains_key(name) {
                unit.removed = true;
                unit.trouble = None;
                changed.insert(name.clone());
            }
        }
        for (name, spec) in resources {
            let Some(unit) = self.units.get_mut(name) else {
                changed.insert(name.clone());
                self.units.insert(name.clone(), Unit::new(spec));
                continue;
            };
            let wanted = (unit.spec.want_online, unit.spec.wanted_unix_ms);
            let another = unit.spec.kind != spec.kind;
            let same = !another && !unit.removed && same_for_host(&unit.spec, spec);
            unit.set_spec(spec);
            if unit.removed {
                unit.removed = false;
                unit.shown = spec.status.clone();
            }
            if another {
                unit.replaced = true;
            }
            if !same {
                changed.insert(name.clone());
            }
            // Something may be different now: with the administrator's word, or with what it is given to work with.
            let ordered = wanted != (spec.want_online, spec.wanted_unix_ms);
            if ordered || !same {
                unit.forgive_unless_noted(ordered);
            }
        }
        changed
    }

    /// A specification holds those of everything that the resource depends on.
    fn mark_stale(&mut self, changed: &BTreeSet<String>) {
        let mut reached = changed.clone();
        loop {
            let hit = |(name, unit): (&String, &Unit)| {
                let needs = unit.needs.iter().any(|on| reached.contains(on));
                (needs && !reached.contains(name)).then(|| name.clone())
            };
            let more: Vec<String> = self.units.iter().filter_map(hit).collect();
            if more.is_empty() {
                break;
            }
            reached.extend(more);
        }
        for name in reached {
            if let Some(unit) = self.units.get_mut(&name) {
                // A call to open it that is under way may have the old one.
                unit.stale |= unit.open.is_some() || unit.call.is_some();
            }
        }
    }

    fn found(&mut self, name: &str, call: u64, online: bool, why: String, out: &mut Vec<Effect>) {
        let Some(unit) = self.units.get_mut(name) else { return };
        let Some(answered) = unit.call.take_if(|there| there.id == call && there.doing == Doing::Adopt)
        else {
            return;
        };
        drop(answered);
        unit.open = Some(unit.wants_own_host());
        unit.opening = None;
        let Presence::Asked { expected } = unit.presence else { return };
        if online {
            unit.presence = Presence::Here;
            unit.initial = false;
            if matches!(unit.trouble, Some(Trouble::Noted { .. })) {
                unit.trouble = None;
            }
            return;
        }
        unit.presence = Presence::Dirty;
        if expected {
            unit.initial = false;
            let why = if why.is_empty() { "it is not online any more".into() } else { why };
            self.fail(name, Failure::passing(why), out);
        }
    }

    fn answer(&mut self, name: &str, call: u64, outcome: Outcome, out: &mut Vec<Effect>) {
        let Some(unit) = self.units.get_mut(name) else { return };
        let Some(answered) = unit.call.take_if(|there| there.id == call) else { return };
        let failure = match outcome {
            Outcome::Done => None,
            Outcome::Failed { why, retry, elsewhere } => Some(Failure { why, retry, elsewhere }),
        };
        let now_ms = self.now.now_ms;
        match (answered.doing, failure) {
            (Doing::Adopt, None) => {
                unit.call = Some(answered);
                self.found(name, call, true, String::new(), out);
            }
            (Doing::Adopt, Some(failure)) => self.not_adopted(name, failure, out),
            (Doing::Open, None) => {
                // An open one stays in the host where it is.
                unit.open = unit.open.or(Some(unit.wants_own_host()));
                unit.opening = None;
            }
            (Doing::Open, Some(failure)) if unit.is_gone() => {
                unit.stale = unit.open.is_some();
                self.fail(name, failure, out);
            }
            // To be ended it has to be open.
            (Doing::Open, Some(failure)) if unit.open.is_none() => {
                unit.opening = Some(back_off(unit.opening.take(), failure.why, now_ms));
            }
            (Doing::Open, Some(failure)) => {
                let text = format!("resource {name} goes on with its former settings: {}", failure.why);
                out.push(Effect::Event { kind: EventKind::ResourceNote, resource: name.into(), text });
            }
            (Doing::Online, None) => {
                unit.presence = Presence::Here;
                unit.because.clear();
            }
            (Doing::Online, Some(failure)) => self.fail(name, failure, out),
            (Doing::Offline | Doing::Terminate, None) => unit.set_gone(),
            (Doing::Offline, Some(_)) => unit.presence = Presence::Dirty,
            (Doing::Terminate, Some(failure)) => {
                unit.ending = Some(back_off(unit.ending.take(), failure.why, now_ms));
            }
            // Nothing is left of it; what the host still remembers harms nobody.
            (Doing::Close, _) => unit.not_open(),
        }
    }

    /// It cannot be opened, so nobody can say whether it is there.
    fn not_adopted(&mut self, name: &str, failure: Failure, out: &mut Vec<Effect>) {
        let now_ms = self.now.now_ms;
        let stopped = matches!(self.mode, Mode::Stop(_));
        let Some(unit) = self.units.get_mut(name) else { return };
        if unit.presence == (Presence::Asked { expected: false }) && !stopped {
            // Nor was it, under this ownership.
            unit.set_gone();
            self.fail(name, failure, out);
        } else {
            unit.opening = Some(back_off(unit.opening.take(), failure.why, now_ms));
        }
    }

    fn progress(&mut self, name: &str, call: u64, text: String) {
        let now_ms = self.now.now_ms;
        let Some(unit) = self.units.get_mut(name) else { return };
        let timeout_ms = unit.spec.policy.pending_timeout_ms;
        let Some(call) = unit.call.as_mut().filter(|there| there.id == call) else { return };
        if call.deadline_ms.is_some() {
            call.deadline_ms = Some(now_ms.saturating_add(timeout_ms));
        }
        if call.text_ms.is_none_or(|at_ms| at_ms.saturating_add(PROGRESS_SHOWN_MS) <= now_ms) {
            call.text = text;
            call.text_ms = Some(now_ms);
        }
    }
}

impl Unit {
    /// A note outlives a change that is not about whether it is to be online.
    fn forgive_unless_noted(&mut self, wanted: bool) {
        if wanted || !matches!(self.trouble, Some(Trouble::Noted { .. })) {
            self.forgive();
        }
    }
}

/// Does an administrator want the group online (again), whatever happened before? (Failures are also forgotten when the group has
/// come online, which says nothing of what has happened since.)
fn wanted_afresh(before: &Group, group: &Group, came_online: bool) -> bool {
    let given_up = before.given_up.is_some() && group.given_up.is_none();
    let forgotten = !before.failures.is_empty() && group.failures.is_empty() && !came_online;
    let wanted = !before.want_online && group.want_online;
    given_up || forgotten || wanted
}

/// Is there nothing new for the host?
fn same_for_host(old: &Resource, new: &Resource) -> bool {
    let Resource { name, kind, group, properties, depends, policy, .. } = new;
    (name, kind, group, properties, depends, policy)
        == (&old.name, &old.kind, &old.group, &old.properties, &old.depends, &old.policy)
}
