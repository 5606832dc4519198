//! How resources and the group are, for the database and for people.

use super::plan::Kept;
use super::unit::{Doing, Presence, Trouble, Unit};
use super::{LocalGroup, Mode};
use crate::db::resource::WHY_BYTES_MAX;
use crate::db::{GroupState, ResourceState, ResourceStatus};
use std::collections::BTreeSet;

/// Resources that are named in a text.
const NAMED_MAX: usize = 4;

impl LocalGroup {
    /// Brings statuses and state up to date.
    pub(super) fn refresh(&mut self) {
        let kept = self.kept();
        let hopeful = self.hopeful(&kept);
        let shown: Vec<_> = self
            .units
            .iter()
            .filter_map(|(name, unit)| Some((name.clone(), self.show(unit, &kept, &hopeful)?)))
            .collect();
        let at_unix_ms = self.now.at_unix_ms;
        for (name, (state, mut why)) in shown {
            cut(&mut why);
            let Some(unit) = self.units.get_mut(&name) else { continue };
            let since_unix_ms = if unit.shown.state == state { unit.shown.since_unix_ms } else { at_unix_ms };
            unit.shown = ResourceStatus { state, why, since_unix_ms };
        }
        self.state = self.group_state();
        let failures = self.group.as_ref().is_some_and(|group| !group.failures.is_empty());
        self.said_online = failures && (self.said_online || self.state == GroupState::Online);
    }

    /// Resources that are online or may come online by themselves.
    fn hopeful(&self, kept: &Kept) -> BTreeSet<String> {
        let mut hopeful = kept.clone();
        loop {
            let comes = |(name, unit): (&String, &Unit)| {
                let barred = matches!(unit.trouble, Some(Trouble::Final { .. } | Trouble::Noted { .. }));
                let comes = !barred
                    && !hopeful.contains(name)
                    && self.wanted(unit)
                    && unit.expr.holds(&|on: &str| hopeful.contains(on));
                comes.then(|| name.clone())
            };
            let more: Vec<String> = self.units.iter().filter_map(comes).collect();
            if more.is_empty() {
                return hopeful;
            }
            hopeful.extend(more);
        }
    }

    /// State and reason; `None`: as before.
    fn show(&self, unit: &Unit, kept: &Kept, hopeful: &Kept) -> Option<(ResourceState, String)> {
        use ResourceState::{Failed, Offline, OfflinePending, Online, OnlinePending};
        if !unit.is_gone() {
            if let Some(ending) = &unit.ending {
                return Some((Failed, format!("could not be ended, which is tried again: {}", ending.why)));
            }
            if let Some(opening) = unit.opening.as_ref().filter(|opening| opening.lasts()) {
                let why = format!("cannot be looked after, which is tried again: {}", opening.why);
                return Some((if unit.initial { ResourceState::Unknown } else { Failed }, why));
            }
        }
        if let Some(Trouble::Noted { why }) = &unit.trouble {
            return Some((Failed, format!("failed during maintenance and is left alone: {why}")));
        }
        let coming = self.wanted(unit) && (self.starts() || unit.doing() == Some(Doing::Online));
        match (unit.presence, unit.doing()) {
            (Presence::Asked { .. }, _) => return None,
            (Presence::Here, None | Some(Doing::Open)) if kept.contains(&unit.spec.name) => {
                return Some((Online, String::new()));
            }
            // A new owner makes sure that nothing is left; nobody need see that.
            (Presence::Dirty, _) if unit.initial && !coming => return None,
            (Presence::Here | Presence::Dirty, _) if !coming => {
                return Some((OfflinePending, with_progress(unit, self.why_down())));
            }
            (Presence::Gone, _) if !coming => return Some((Offline, self.why_off())),
            _ => {}
        }
        Some(match &unit.trouble {
            Some(Trouble::Final { why, elsewhere, .. }) => (Failed, no_help(why, *elsewhere)),
            Some(Trouble::Restart { why, number, .. }) => {
                let of = unit.spec.policy.restart_threshold;
                (OnlinePending, format!("is started again ({number} of {of}): {why}"))
            }
            Some(Trouble::Noted { .. }) => return None,
            None if unit.doing() == Some(Doing::Online) => {
                (OnlinePending, with_progress(unit, unit.because.clone()))
            }
            None => self.show_waiting(unit, kept, hopeful),
        })
    }

    /// It is to be online and is not, or has to go because of what it depends on.
    fn show_waiting(&self, unit: &Unit, kept: &Kept, hopeful: &Kept) -> (ResourceState, String) {
        let waits = self.waits_for(unit, kept, hopeful);
        let leaves = unit.presence == Presence::Here;
        if leaves {
            return (ResourceState::OfflinePending, with_progress(unit, waits));
        }
        if unit.expr.holds(&|on: &str| hopeful.contains(on)) {
            let text = if waits.is_empty() { unit.because.clone() } else { waits };
            return (ResourceState::OnlinePending, text);
        }
        let gone = unit.is_gone();
        (if gone { ResourceState::Offline } else { ResourceState::OfflinePending }, waits)
    }

    fn waits_for(&self, unit: &Unit, kept: &Kept, hopeful: &Kept) -> String {
        if unit.expr.holds(&|on: &str| self.firm(on, kept)) {
            return String::new();
        }
        let lacks: Vec<&str> = unit.expr.names().into_iter().filter(|on| !self.firm(on, kept)).collect();
        let lack = |on: &&str| {
            let reason = match self.units.get(*on) {
                None => ", which is not in this group",
                Some(other) if other.removed => ", which is removed",
                Some(other) if !other.spec.want_online => ", which is to stay offline",
                Some(other)
                    if matches!(other.trouble, Some(Trouble::Final { .. } | Trouble::Noted { .. })) =>
                {
                    ", which has failed"
                }
                Some(_) if !hopeful.contains(*on) => ", which waits itself",
                Some(_) => "",
            };
            format!("[{on}]{reason}")
        };
        let more = if lacks.len() > NAMED_MAX { "; ..." } else { "" };
        let named: Vec<String> = lacks.iter().take(NAMED_MAX).map(lack).collect();
        format!("waits for {}{more}", named.join("; "))
    }

    fn why_down(&self) -> String {
        match &self.mode {
            Mode::Run => String::new(),
            Mode::Release => "the group leaves this node".into(),
            Mode::Stop(reason) => reason.clone(),
        }
    }

    fn why_off(&self) -> String {
        match &self.mode {
            Mode::Stop(reason) => reason.clone(),
            Mode::Run | Mode::Release => String::new(),
        }
    }

    fn group_state(&self) -> GroupState {
        let wanted = || self.units.iter().filter(|(_, unit)| unit.spec.want_online && !unit.removed);
        let reason = |name: &str, unit: &Unit| format!("[{name}] {}", unit.shown.why);
        // What cannot be ended here cannot go elsewhere; what fails everywhere alike need not.
        let fails = wanted().find_map(|(name, unit)| {
            let Some(Trouble::Final { elsewhere: true, why, .. }) = &unit.trouble else { return None };
            let fails = unit.spec.policy.affects_group && unit.ending.is_none() && unit.opening.is_none();
            // Not what is shown: that changes when the group goes offline.
            fails.then(|| format!("[{name}] {why}"))
        });
        if let Some(mut reason) = fails {
            cut(&mut reason);
            return GroupState::Failed { reason };
        }
        // Nobody has been asked yet: as it was.
        let asked = |unit: &Unit| matches!(unit.presence, Presence::Asked { .. }) && unit.initial;
        if self.group.is_none() || self.units.values().any(asked) {
            return match self.group.as_ref().map(|group| &group.state) {
                Some(
                    state @ (GroupState::Online | GroupState::Partial { .. } | GroupState::Failed { .. }),
                ) => state.clone(),
                Some(GroupState::Offline { .. } | GroupState::Pending | GroupState::Releasing { .. })
                | None => GroupState::Pending,
            };
        }
        let pending = |state: ResourceState| match state {
            ResourceState::OnlinePending | ResourceState::OfflinePending | ResourceState::Unknown => true,
            ResourceState::Offline | ResourceState::Online | ResourceState::Failed => false,
        };
        if self.mode != Mode::Run || wanted().any(|(_, unit)| pending(unit.shown.state)) {
            return GroupState::Pending;
        }
        let lacking = wanted().filter(|(_, unit)| unit.shown.state != ResourceState::Online);
        // What has failed says more than what waits for it.
        match lacking.min_by_key(|(_, unit)| unit.shown.state != ResourceState::Failed) {
            Some((name, unit)) => GroupState::Partial { reason: reason(name, unit) },
            None => GroupState::Online,
        }
    }
}

fn no_help(why: &str, elsewhere: bool) -> String {
    if elsewhere { why.into() } else { format!("{why} (on another node it would be the same)") }
}

fn with_progress(unit: &Unit, text: String) -> String {
    match &unit.call {
        Some(call) if !call.text.is_empty() => call.text.clone(),
        Some(_) | None => text,
    }
}

fn cut(text: &mut String) {
    let mut end = text.len().min(WHY_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}
